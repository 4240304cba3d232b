"""Images in folders or tar files with one folder per class."""

from collections.abc import Collection, Sequence
from pathlib import Path

from vim.config.schema import IMAGE_EXTENSIONS
from vim.data.archives import list_members
from vim.data.class_folders import label_by_folder
from vim.data.image_files import FileSource, ImageSource, MemberSource
from vim.data.listing import Listing, ending_of, endings_of, list_files, natural_key

_SYNONYMS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation", "test"),
}


def open_folder(
    root: str, split: str, extensions: Sequence[str] = IMAGE_EXTENSIONS, known: Collection[str] = ()
) -> tuple[ImageSource, tuple[str, ...]]:
    """Open the images of a split: a folder or a tar file, with one folder per class.

    Args:
        root: The folder with the splits.
        split: The split.
        extensions: Endings of images, in either case.
        known: Names of classes that are never skipped, see `label_by_folder`.

    Returns:
        The images and the names of their classes, in the order of their labels.

    Raises:
        ValueError: There is no such folder or tar file, no image in it, or an image without a class.
        OSError: A folder cannot be read.
    """
    place = find_split(Path(root).expanduser(), split)
    source = _open_archive(place, extensions, known) if place.is_file() else _open_files(place, extensions, known)
    if not len(source[0]):
        others = ", ".join(f"{count:,} {kind}" for kind, count in source[0].passed_over.most_common(5)) or "no file"
        raise ValueError(
            f"data.path has no images for the split {split!r} in {place}, which holds {others}: images end in "
            f"{', '.join(extensions)} (data.extensions)"
        )
    return source


def _open_files(place: Path, extensions: Sequence[str], known: Collection[str]) -> tuple[FileSource, tuple[str, ...]]:
    listing = list_files(place, extensions)
    labels, names = label_by_folder(listing.paths, str(place), known, listing.folders)
    return FileSource(place, listing.paths, labels, listing.passed_over), names


def _open_archive(
    place: Path, extensions: Sequence[str], known: Collection[str]
) -> tuple[MemberSource, tuple[str, ...]]:
    listing, endings, members = Listing(), endings_of(extensions), []
    for member in list_members(place, listing):
        if member.name.lower().endswith(endings):
            members.append(member)
        else:
            listing.passed_over[ending_of(member.name)] += 1
    members.sort(key=lambda member: natural_key(member.name))
    labels, names = label_by_folder([member.name for member in members], str(place), known, listing.folders)
    return MemberSource(members, labels, listing.passed_over), names


def find_split(root: Path, split: str) -> Path:
    """Return the sub-folder or tar file of a split, under one of its usual names (`validation` for `val`).

    Raises:
        ValueError: It does not exist; the message lists the names that were tried.
    """
    if not root.is_dir():
        raise ValueError(f"data.path must be a folder of images, and {str(root)!r} is not a folder")
    for name in split_names(split):
        for place, there in ((root / name, Path.is_dir), (root / f"{name}.tar", Path.is_file)):
            if there(place):
                return place
    tried = ", ".join(f"{name}/" for name in split_names(split))
    raise ValueError(
        f"data.path {str(root)!r} must have a folder or tar file for the split {split!r}: found none of {tried} or "
        f"{split}.tar"
    )


def split_names(split: str) -> tuple[str, ...]:
    """Return the usual names of a split, its own first."""
    names = next((names for names in _SYNONYMS.values() if split in names), ())
    return tuple(dict.fromkeys((split, *names)))
