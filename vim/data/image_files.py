"""Images in files, read and augmented one by one; an unreadable image is replaced or skipped."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vim.data.archives import Member
from vim.data.decoding import read_image, to_color_mode, upright
from vim.data.order import Place
from vim.data.randomness import Draw, seeded
from vim.data.reading import read_or_replace
from vim.data.unreadable import Batch, Unreadable


class ImageSource(Protocol):
    """Images of a split and their labels."""

    passed_over: Counter[str]
    """Number of other files, by kind."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return an image, decoded and upright, and its label."""
        ...

    def name(self, index: int) -> str:
        """Return the name of an image, for messages."""
        ...

    def labels(self) -> Sequence[int] | None:
        """Return the label of each image, or `None` if the images must be read to know it."""
        ...

    def keys(self) -> Sequence[str] | None:
        """Return a name for each image that does not change when the data moves, or `None` without names."""
        ...

    def size(self, index: int) -> int | None:
        """Return the bytes of an image's file, or `None` if they are unknown."""
        ...


class FileSource:
    """Images in files.

    Args:
        root: Folder of the images.
        paths: Paths of the images in it, with `/` between the parts.
        labels: Label of each image.
        passed_over: Number of other files, by kind.
    """

    def __init__(self, root: Path, paths: Sequence[str], labels: Sequence[int], passed_over: Counter[str]) -> None:
        self._root, self._paths, self._labels, self.passed_over = root, paths, labels, passed_over

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return an image, decoded and upright, and its label."""
        return read_image(self.name(index)), self._labels[index]

    def name(self, index: int) -> str:
        """Return the path of the file."""
        return str(self._root / self._paths[index])

    def labels(self) -> Sequence[int]:
        """Return the label of each image."""
        return self._labels

    def keys(self) -> Sequence[str]:
        """Return the path of each file below the folder of the split."""
        return self._paths

    def size(self, index: int) -> int | None:
        """Return the bytes of a file, or `None` if it is gone."""
        try:
            return os.path.getsize(self.name(index))
        except OSError:
            return None


class MemberSource:
    """Images in tar files.

    Args:
        members: The images.
        labels: Label of each image.
        passed_over: Number of other files, by kind.
    """

    def __init__(self, members: Sequence[Member], labels: Sequence[int], passed_over: Counter[str]) -> None:
        self._members, self._labels, self.passed_over = members, labels, passed_over

    def __len__(self) -> int:
        return len(self._members)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return an image, decoded and upright, and its label."""
        return read_image(self._members[index].open()), self._labels[index]

    def name(self, index: int) -> str:
        """Return the path of the tar file, with the name of the image in it."""
        return f"{self._members[index].archive}:{self._members[index].name}"

    def labels(self) -> Sequence[int]:
        """Return the label of each image."""
        return self._labels

    def keys(self) -> Sequence[str]:
        """Return the name of the tar file and of the image in it, for each image."""
        return [f"{member.archive.name}:{member.name}" for member in self._members]

    def size(self, index: int) -> int:
        """Return the bytes of an image in its tar file."""
        return self._members[index].size


class ReaderSource:
    """Images of a reader of timm.

    Args:
        reader: Sequence of (file, label).
        labels: Label of each image, if known.
    """

    def __init__(self, reader: Any, labels: Sequence[int] | None = None) -> None:
        self.reader, self._labels = reader, labels
        self.passed_over: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return an image, decoded and upright, and its label."""
        file, label = self.reader[index]
        with file:
            return read_image(file), label

    def name(self, index: int) -> str:
        """Return the path of the file."""
        return str(self.reader.filename(index, absolute=True))

    def labels(self) -> Sequence[int] | None:
        """Return the label of each image, or `None` if they are unknown."""
        return self._labels

    def keys(self) -> None:
        """Return `None`: the files may be in a cache, under arbitrary names."""

    def size(self, index: int) -> None:
        """Return `None`: a reader does not say."""


class TorchvisionSource:
    """Images of a data set of torchvision that has no transform.

    Args:
        dataset: Sequence of (image, label).
        title: Name of the data set.
    """

    def __init__(self, dataset: Any, title: str) -> None:
        self.dataset = dataset
        self._title = title
        self.passed_over: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return an image, upright, and its label."""
        image, label = self.dataset[index]
        return upright(image), label

    def name(self, index: int) -> str:
        """Return the name of the data set, with the number of the image."""
        return f"{self._title}[{index}]"

    def labels(self) -> Sequence[int] | None:
        """Return the label of each image from the attribute `targets`, or `None` if the data set lacks it."""
        labels = getattr(self.dataset, "targets", None)
        return None if labels is None or len(labels) != len(self) else [int(label) for label in labels]

    def keys(self) -> None:
        """Return `None`: the images have numbers only."""

    def size(self, index: int) -> None:
        """Return `None`: the images need not be files."""


class Relabelled:
    """Images of another source with new labels.

    Args:
        source: The images.
        labels: New label for each label of the source.
    """

    def __init__(self, source: ImageSource, labels: Sequence[int]) -> None:
        self.source = source
        self._labels = labels
        self.passed_over = source.passed_over

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return an image, decoded and upright, and its new label."""
        image, label = self.source.read(index)
        return image, self._new_label(label)

    def name(self, index: int) -> str:
        """Return the name of an image."""
        return self.source.name(index)

    def labels(self) -> Sequence[int] | None:
        """Return the new label of each image, or `None` if the source does not know its labels."""
        labels = self.source.labels()
        return None if labels is None else [self._new_label(label) for label in labels]

    def keys(self) -> Sequence[str] | None:
        """Return the keys of the source."""
        return self.source.keys()

    def size(self, index: int) -> int | None:
        """Return the bytes of an image's file in the source."""
        return self.source.size(index)

    def _new_label(self, label: int) -> int:
        return self._labels[label] if 0 <= label < len(self._labels) else -1


class ImageFiles(Dataset[tuple[Tensor, Tensor]]):
    """A data set of image files, read a batch at a time.

    It is indexed with a list of `Place`s and returns a whole batch with its unreadable images; the loader collates
    nothing.

    Args:
        source: The images.
        num_classes: Labels must be less than this.
        color_mode: The mode of PIL that images are converted to.
        bits: Bits in use of a 16-bit grey image.
        seed: Seed of the run, for the augmentation.
        replace: Replace an unreadable image by a random one; otherwise skip it.
    """

    def __init__(
        self, source: ImageSource, num_classes: int, color_mode: str, *, bits: int = 16, seed: int, replace: bool
    ) -> None:
        self.source = source
        self.transform: Callable[[Image.Image], Tensor] | None = None
        """Maps an image to (channels, height, width), uint8; it draws from the global random generators."""
        self._num_classes, self._color_mode, self._bits = num_classes, color_mode, bits
        self._seed, self._replace = seed, replace

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, places: Sequence[Place]) -> Batch:
        """Read a batch.

        Raises:
            RuntimeError: Ten images in a row, drawn at random, could not be read.
        """
        unreadable: list[Unreadable] = []
        found = [item for place in places if (item := self._read_at(place, unreadable)) is not None]
        images = torch.stack([image for image, _ in found]) if found else torch.empty(0, dtype=torch.uint8)
        return images, torch.tensor([label for _, label in found], dtype=torch.int64), unreadable

    def _read_at(self, place: Place, unreadable: list[Unreadable]) -> tuple[Tensor, int] | None:
        """Return the augmented image at a place and its label; for an unreadable one a replacement, or `None`."""
        found = read_or_replace(
            place, self._read, self.source.name, len(self), unreadable, seed=self._seed, replace=self._replace
        )
        return None if found is None else (self._transformed(found[0], place), found[1])

    def _read(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.source.read(index)
        if not 0 <= label < self._num_classes:
            raise ValueError(f"its label must be from 0 to {self._num_classes - 1}, got {label}")
        return to_color_mode(image, self._color_mode, self._bits), int(label)

    def _transformed(self, image: Image.Image, place: Place) -> Tensor:
        if self.transform is None:
            raise RuntimeError("a transform must be set before images are read")
        with seeded(Draw.AUGMENTATION, self._seed, place.epoch, place.position):
            return self.transform(image)
