"""Images in folders or tar files with a folder a class, and in the shards of WebDataset."""

from pathlib import Path

from timm.data.readers import create_reader

from vim.data.image_files import ReaderSource
from vim.data.shards import ShardReader, find_shards

_SYNONYMS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation", "test"),
}


def open_folder(root: str, split: str) -> tuple[ReaderSource, tuple[str, ...]]:
    """Open the images of a split: a folder, or a tar file, with a folder a class.

    Returns:
        The images and the names of their classes, in the order of their labels.

    Raises:
        ValueError: There is no such folder or tar file, or no image in it.
    """
    place = find_split(Path(root).expanduser(), split)
    try:
        reader = create_reader("", root=str(place))
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"data.path has no images for the split {split!r} in {place}: {error}") from error
    labels = reader.class_name_to_idx if place.is_file() else reader.class_to_idx
    return ReaderSource(reader), tuple(sorted(labels, key=lambda name: labels[name]))


def open_shards(root: str, split: str) -> tuple[ReaderSource, tuple[str, ...] | None]:
    """Open the images of a split in WebDataset's shards, for reading in any order.

    Returns:
        The images, and the names of their classes if the shards tell.

    Raises:
        ValueError: There are no shards, or no labelled image in them.
    """
    reader = ShardReader(find_shards(Path(root).expanduser(), split_names(split)))
    return ReaderSource(reader), reader.class_names


def find_split(root: Path, split: str) -> Path:
    """Return the sub-folder or tar file of a split, which may go by another usual name (`validation` for `val`).

    Raises:
        ValueError: There is none; the message lists the names that were tried.
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
    """Return the names that a split may go by, its own first."""
    names = next((names for names in _SYNONYMS.values() if split in names), ())
    return tuple(dict.fromkeys((split, *names)))
