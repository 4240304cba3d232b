"""Random access to WebDataset shards on a disk: tar files in which an image and its label are neighbours.

The `webdataset` package reads shards as a stream. The order then depends on the number of processes, and reading cannot
begin in the middle. Here the headers are read once, and every image by its offset. Shuffling covers the whole epoch,
evaluation is exact, and an interrupted run resumes at its position.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from vim.config.schema import IMAGE_EXTENSIONS
from vim.data.archives import Member, list_members
from vim.data.folders import split_names
from vim.data.image_files import MemberSource
from vim.data.listing import Listing, endings_of

_LABEL = ".cls"
_METADATA = ".json"
_LONGEST_LABEL = 1 << 20  # bytes; a label is a number, or a small JSON object with one
_CLASS_NAMES = "classnames.txt"


def open_shards(
    root: str, split: str, extensions: Sequence[str] = IMAGE_EXTENSIONS
) -> tuple[MemberSource, tuple[str, ...] | None]:
    """Open the images of a split in WebDataset shards, for random access.

    A sample is an image `KEY.jpg` with `KEY.cls` (a number) or `KEY.json` (an object with a number under `label`). A
    file `classnames.txt` in the folder of the shards names the classes, one per line.

    Args:
        root: The folder with the shards.
        split: The split.
        extensions: Endings of images, in either case.

    Returns:
        The images, and the names of their classes, or `None` without names.

    Raises:
        ValueError: There are no shards, a file is not a tar file, or there are no labelled images.
    """
    shards = find_shards(Path(root).expanduser(), split_names(split))
    listing = Listing()
    members: list[Member] = []
    labels: list[int] = []
    for shard in shards:
        for member, label in _samples(shard, endings_of(extensions), listing):
            members.append(member)
            labels.append(label)
    if not members:
        raise ValueError(f"data.path must have images with a label, KEY.jpg and KEY.cls: {shards[0]} has none")
    return MemberSource(members, labels, listing.passed_over), _class_names(shards[0])


def find_shards(root: Path, splits: tuple[str, ...]) -> list[Path]:
    """Return the shards of a split, sorted by name: `SPLIT/*.tar`, `SPLIT-*.tar`, `*-SPLIT-*.tar`.

    Args:
        root: The folder with the shards.
        splits: Names of the split, the preferred one first.

    Raises:
        ValueError: There are no shards.
    """
    if not root.is_dir():
        raise ValueError(f"data.path must be a folder of shards, and {str(root)!r} is not a folder")
    for split in splits:
        for pattern in (f"{split}/*.tar", f"{split}[-_.]*.tar", f"*[-_.]{split}[-_.]*.tar"):
            found = sorted(path for path in root.glob(pattern) if not path.name.startswith("."))
            if found:
                return found
    raise ValueError(
        f"data.path {str(root)!r} must have shards for the split {splits[0]!r}, such as {splits[0]}/*.tar or "
        f"{splits[0]}-000.tar: found none for {', '.join(splits)}"
    )


def _samples(shard: Path, endings: tuple[str, ...], listing: Listing) -> list[tuple[Member, int]]:
    """Return the labelled images of a shard, and count the other samples as passed over."""
    images: dict[str, Member] = {}
    labels: dict[str, int] = {}
    others: dict[str, str] = {}
    with open(shard, "rb") as file:
        for member in list_members(shard, listing):
            key, ending = _split_name(member.name)
            if ending in (_LABEL, _METADATA):
                label = _read_label(member.read(file, _LONGEST_LABEL), ending)
                if label is not None:
                    labels.setdefault(key, label)
            elif ending not in endings:
                others.setdefault(key, ending)
            elif key in images:
                listing.passed_over["second image of a sample"] += 1
            else:
                images[key] = member
    without_image = (labels.keys() | others.keys()) - images.keys()
    listing.passed_over.update(others.get(key, "label without an image") for key in without_image)
    listing.passed_over.update("image without a label" for _ in images.keys() - labels.keys())
    return [(image, labels[key]) for key, image in images.items() if key in labels]


def _split_name(name: str) -> tuple[str, str]:
    """Split the name of a file at its first dot into the key of the sample and the ending."""
    folder, slash, base = name.rpartition("/")
    stem, dot, ending = base.partition(".")
    return folder + slash + stem, dot + ending.lower()


def _read_label(data: bytes, ending: str) -> int | None:
    """Return the number in a label file, or `None` if there is none."""
    try:
        if ending == _LABEL:
            return int(data.decode("utf-8-sig"))
        contents = json.loads(data)
        label = contents.get("label") if isinstance(contents, dict) else None
        return label if type(label) is int else None
    except (ValueError, RecursionError):
        return None


def _class_names(shard: Path) -> tuple[str, ...] | None:
    """Return the names in the file `classnames.txt` of a shard's folder, or of its parent folder.

    Raises:
        ValueError: The file is not UTF-8, or a name occurs twice.
    """
    for folder in (shard.parent, shard.parent.parent):
        file = folder / _CLASS_NAMES
        if file.is_file():
            try:
                lines = file.read_text(encoding="utf-8-sig").splitlines()
            except UnicodeDecodeError as error:
                raise ValueError(f"data.path has a {_CLASS_NAMES} that is not UTF-8, {file}: {error}") from error
            names = tuple(line.strip() for line in lines if line.strip())
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                raise ValueError(f"data.path has the class {twice[0]!r} twice in {file}")
            return names
    return None
