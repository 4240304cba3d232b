"""A data set of images with objects, read a batch at a time."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from vim.data.decoding import to_color_mode
from vim.data.instances import Instances, InstanceSource
from vim.data.order import Place
from vim.data.randomness import Draw, seeded
from vim.data.reading import read_or_replace
from vim.data.unreadable import Unreadable

Augment = Callable[[Image.Image, Instances], tuple[Tensor, dict[str, Tensor]]]


class TrainBatch(NamedTuple):
    """Augmented images of one size, and the objects of each."""

    images: Tensor
    """(batch, channels, height, width), uint8."""
    targets: list[dict[str, Tensor]]
    """`boxes` (n, 4), `labels` (n,), and `masks` (n, height, width), for each image."""
    unreadable: list[Unreadable]


class EvalBatch(NamedTuple):
    """Images of any size as they are, and the objects of each."""

    images: list[Tensor]
    """(channels, height, width), uint8, for each image."""
    truth: list[Instances]
    indices: list[int]
    """Index of each image in the data set."""
    unreadable: list[Unreadable]


class InstanceImages(Dataset[TrainBatch]):
    """The images of a split with their objects; it is indexed with a list of `Place`s and returns a whole batch.

    Args:
        source: The images.
        color_mode: The mode of PIL that images are converted to.
        bits: Bits in use of a 16-bit grey image.
        seed: Seed of the run, for the augmentation.
        augment: Maps an image and its objects to a training image and its target; an unreadable image is replaced.
            `None` returns images as they are, and skips unreadable ones.
    """

    def __init__(
        self, source: InstanceSource, color_mode: str, *, bits: int = 16, seed: int = 0, augment: Augment | None = None
    ) -> None:
        self.source, self._augment = source, augment
        self._color_mode, self._bits, self._seed = color_mode, bits, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, places: Sequence[Place]) -> TrainBatch | EvalBatch:
        """Read a batch.

        Raises:
            RuntimeError: Ten images in a row, drawn at random, could not be read.
        """
        unreadable: list[Unreadable] = []
        items = [(place, self._read_at(place, unreadable)) for place in places]
        found = [(place, *item) for place, item in items if item is not None]
        if self._augment is None:
            images = [pil_to_tensor(image) for _, image, _ in found]
            truth = [instances for _, _, instances in found]
            return EvalBatch(images, truth, [place.image for place, _, _ in found], unreadable)
        augmented = [self._augmented(*item) for item in found]
        return TrainBatch(
            torch.stack([image for image, _ in augmented]), [target for _, target in augmented], unreadable
        )

    def _read_at(self, place: Place, unreadable: list[Unreadable]) -> tuple[Image.Image, Instances] | None:
        replace = self._augment is not None
        name, count = self.source.name, len(self)
        return read_or_replace(place, self.read, name, count, unreadable, seed=self._seed, replace=replace)

    def read(self, index: int) -> tuple[Image.Image, Instances]:
        """Return an image in the colour mode of the model, and its objects."""
        image, instances = self.source.read(index)
        return to_color_mode(image, self._color_mode, self._bits), instances

    def _augmented(self, place: Place, image: Image.Image, instances: Instances) -> tuple[Tensor, dict[str, Tensor]]:
        if self._augment is None:
            raise RuntimeError("images that are not augmented have no target")
        with seeded(Draw.AUGMENTATION, self._seed, place.epoch, place.position):
            return self._augment(image, instances)
