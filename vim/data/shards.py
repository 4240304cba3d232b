"""WebDataset's shards on a disk, read in any order: an image and its label are neighbours in a tar file.

The `webdataset` package reads shards as a stream, whose order depends on the number of processes and which cannot be
entered in the middle. Here the headers are read once, and then every image by its place in its shard, so that an epoch
is shuffled as a whole, an evaluation is exact and a run that was interrupted goes on where it was.
"""

import io
import json
import tarfile
from pathlib import Path
from typing import NamedTuple

from timm.data.readers import get_img_extensions
from timm.data.readers.reader import Reader

_LABEL = ".cls"
_METADATA = ".json"
_LONGEST_LABEL = 1 << 20  # bytes; a label is a number, or a small JSON object with one


class _Member(NamedTuple):
    """A file inside a shard."""

    shard: int
    offset: int
    size: int
    name: str


def find_shards(root: Path, splits: tuple[str, ...]) -> list[Path]:
    """Return the shards of a split in the order of their names: `SPLIT/*.tar`, `SPLIT-*.tar`, `*-SPLIT-*.tar`.

    Args:
        root: The folder with the shards.
        splits: Names of the split, the preferred one first.

    Raises:
        ValueError: There are none.
    """
    if not root.is_dir():
        raise ValueError(f"data.path must be a folder of shards, and {str(root)!r} is not a folder")
    for split in splits:
        for pattern in (f"{split}/*.tar", f"{split}[-_.]*.tar", f"*[-_.]{split}[-_.]*.tar"):
            found = sorted(root.glob(pattern))
            if found:
                return found
    raise ValueError(
        f"data.path {str(root)!r} must have shards for the split {splits[0]!r}, such as {splits[0]}/*.tar or "
        f"{splits[0]}-000.tar: found none for {', '.join(splits)}"
    )


class ShardReader(Reader):
    """Reads labelled images from shards by index.

    A sample is the files of one key, `KEY.jpg` with `KEY.cls` (a number) or `KEY.json` (an object with a number under
    `label`). A `classnames.txt` beside the shards, a name a line, names the classes.

    Args:
        shards: The tar files.

    Raises:
        ValueError: A file is no tar file, or there is no labelled image.
    """

    def __init__(self, shards: list[Path]) -> None:
        super().__init__()
        self._shards = shards
        self._images: list[_Member] = []
        self._labels: list[int] = []
        extensions = get_img_extensions(as_set=True)
        for number, shard in enumerate(shards):
            self._index(number, shard, extensions)
        if not self._images:
            raise ValueError(f"data.path must have images with a label, KEY.jpg and KEY.cls: {shards[0]} has none")
        self.class_names = _class_names(shards[0])

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        """Return the file of an image and its label."""
        member = self._images[index]
        with open(self._shards[member.shard], "rb") as shard:
            shard.seek(member.offset)
            return io.BytesIO(shard.read(member.size)), self._labels[index]

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        member = self._images[index]
        return Path(member.name).name if basename else f"{self._shards[member.shard]}:{member.name}"

    def _index(self, number: int, shard: Path, extensions: set[str]) -> None:
        """Add the labelled images of a shard."""
        images: dict[str, _Member] = {}
        labels: dict[str, int] = {}
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    key, extension = _split_name(member.name)
                    if not member.isfile():
                        continue
                    if extension in extensions:
                        images[key] = _Member(number, member.offset_data, member.size, member.name)
                    elif extension in (_LABEL, _METADATA) and key not in labels:
                        file = archive.extractfile(member)
                        label = None if file is None else _read_label(file.read(_LONGEST_LABEL), extension)
                        if label is not None:
                            labels[key] = label
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ValueError(f"data.path has a shard that is damaged or no tar file, {shard}: {error}") from error
        for key, image in images.items():
            if key in labels:
                self._images.append(image)
                self._labels.append(labels[key])


def _split_name(name: str) -> tuple[str, str]:
    """Return the key of a sample and the extension of one of its files: what follows the first dot of the name."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return folder + slash + stem, dot + extension.lower()


def _read_label(data: bytes, extension: str) -> int | None:
    """Return the number in a label file, or `None` if it has none."""
    try:
        if extension == _LABEL:
            return int(data)
        contents = json.loads(data)
        label = contents.get("label") if isinstance(contents, dict) else None
        return label if isinstance(label, int) else None
    except ValueError:
        return None


def _class_names(shard: Path) -> tuple[str, ...] | None:
    """Return the names in `classnames.txt` beside a shard, or in the folder above."""
    for folder in (shard.parent, shard.parent.parent):
        file = folder / "classnames.txt"
        if file.is_file():
            return tuple(line for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    return None
