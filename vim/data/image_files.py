"""Images that are files, read and augmented one by one; one that cannot be read is replaced or left out."""

import os
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import Tensor
from torch.utils.data import Dataset

from vim.data.order import Place
from vim.data.preprocessing import to_color_mode
from vim.data.randomness import Draw, generator_for, seeded
from vim.data.unreadable import Batch, Unreadable

# What Pillow raises, over all of its formats, for a file that is missing, no image, cut short, damaged or too large.
BAD_IMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# So many images in a row that cannot be read are no damaged files but a disk that is not there.
_MOST_IN_A_ROW = 10


def check_regular(path: str) -> None:
    """Raise OSError for what is there and no regular file: a pipe that nobody writes to would be read for ever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("it is not a regular file")


class ImageSource(Protocol):
    """Where images and their labels come from."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return an image, opened at least, and its label."""
        ...

    def name(self, index: int) -> str:
        """Return the name of an image, for messages."""
        ...


class ReaderSource:
    """Images of a reader of timm.

    Args:
        reader: Gives a file and a label by index.
    """

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return an image, decoded, and its label."""
        if isinstance(self.reader, ReaderImageFolder):
            check_regular(self.name(index))
        file, label = self.reader[index]
        with file:
            image = Image.open(file)
            image.load()
        return image, label

    def name(self, index: int) -> str:
        """Return the path of the file."""
        return str(self.reader.filename(index, absolute=True))


class TorchvisionSource:
    """Images of a data set of torchvision that has no transform.

    Args:
        dataset: Gives an image and a label by index.
        title: Name of the data set.
    """

    def __init__(self, dataset: Any, title: str) -> None:
        self.dataset = dataset
        self._title = title

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return an image and its label."""
        return self.dataset[index]

    def name(self, index: int) -> str:
        """Return the data set's name with the number of the image in it."""
        return f"{self._title}[{index}]"


class Relabelled:
    """Images with other labels.

    Args:
        source: The images.
        labels: Our label for each of theirs.
    """

    def __init__(self, source: ImageSource, labels: Sequence[int]) -> None:
        self.source = source
        self._labels = labels

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return an image and our label of it."""
        image, label = self.source.read(index)
        return image, self._labels[label] if 0 <= label < len(self._labels) else -1

    def name(self, index: int) -> str:
        """Return the name of an image."""
        return self.source.name(index)


class ImageFiles(Dataset[tuple[Tensor, Tensor]]):
    """A data set of image files, read a batch at a time.

    The loader over it hands out `Place`s and collates nothing: a batch arrives whole, with what was unreadable.

    Args:
        source: Where the images come from.
        num_classes: Labels must be less than this.
        color_mode: The mode of PIL that images are converted to.
        seed: Seed of the run, for the augmentation.
        replace: Show another image, drawn at random, for one that cannot be read; else leave it out of its batch.
    """

    def __init__(self, source: ImageSource, num_classes: int, color_mode: str, *, seed: int, replace: bool) -> None:
        self.source = source
        self.transform: Callable[[Image.Image], Tensor] | None = None
        """From an image to (channels, height, width), uint8; drawn from the global random generators."""
        self._num_classes, self._color_mode = num_classes, color_mode
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
        """Return the augmented image of a place and its label, or another one's, or none."""
        tried: list[Unreadable] = []
        index, other = place.image, generator_for(Draw.REPLACEMENT, self._seed, place.epoch, place.position)
        while True:
            try:
                image, label = self._read(index)
            except BAD_IMAGE as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                tried.append(Unreadable(self.source.name(index), reason))
                unreadable.append(tried[-1])
            else:
                return self._transformed(image, place), label
            if not self._replace:
                return None
            if len(tried) == _MOST_IN_A_ROW:
                raise RuntimeError(
                    f"{len(tried)} images in a row, drawn at random, could not be read; the last was {tried[-1].name}: "
                    f"{tried[-1].reason}"
                )
            index = int(torch.randint(len(self.source), (), generator=other))

    def _read(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.source.read(index)
        if not 0 <= label < self._num_classes:
            raise ValueError(f"its label is {label}, which is none of the {self._num_classes} classes")
        return to_color_mode(image, self._color_mode), int(label)

    def _transformed(self, image: Image.Image, place: Place) -> Tensor:
        if self.transform is None:
            raise RuntimeError("a transform must be set before images are read")
        with seeded(Draw.AUGMENTATION, self._seed, place.epoch, place.position):
            return self.transform(image)
