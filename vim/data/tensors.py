"""Images that fit in memory, read, cropped and flipped a batch at a time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from vim.data.order import Place
from vim.data.randomness import Draw, generator_for
from vim.data.unreadable import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomCropFlip:
    """A random crop of each image, resized to the full size, and random flips; one call for a whole batch.

    The caller passes the random numbers, `draws_per_image` for each image.

    Crops have the distribution of `torchvision.transforms.RandomResizedCrop`: uniform area, log-uniform aspect ratio,
    uniform position. The exception is a side longer than the image, which is clamped instead of drawn again.
    """

    draws_per_image: ClassVar[int] = 6

    scale: tuple[float, float]
    """Share of the area to keep, lowest and highest."""
    ratio: tuple[float, float]
    """Width over height, lowest and highest."""
    hflip: float
    """Probability of a left-right flip."""
    vflip: float
    """Probability of an up-down flip."""
    interpolation: str
    """`nearest`, `bilinear` or `bicubic`."""

    def __post_init__(self) -> None:
        if self.interpolation not in ("nearest", "bilinear", "bicubic"):
            raise ValueError(
                "augment.interpolation must be 'nearest', 'bilinear' or 'bicubic' for images in memory, got "
                f"{self.interpolation!r}"
            )

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Crop and flip a batch.

        Args:
            images: (batch, channels, height, width), pixels between 0 and 255; any dtype.
            draws: (batch, draws_per_image), uniform in [0, 1), float32.

        Returns:
            The same shape as `images`, float32, still between 0 and 255.
        """
        batch, _, height, width = images.shape
        for_area, for_ratio, for_left, for_top, for_hflip, for_vflip = draws.unbind(dim=1)
        area = _between(self.scale, for_area)
        aspect = _between((math.log(self.ratio[0]), math.log(self.ratio[1])), for_ratio).exp() * (
            height / width
        )  # of the crop, in units of the image's sides
        crop_width = (area * aspect).sqrt().clamp(max=1.0)
        crop_height = (area / aspect).sqrt().clamp(max=1.0)
        # Sides and centres in the coordinates of grid_sample, where the image spans -1 to 1.
        theta = torch.zeros(batch, 2, 3)
        theta[:, 0, 0] = crop_width * _signs(for_hflip, self.hflip)
        theta[:, 1, 1] = crop_height * _signs(for_vflip, self.vflip)
        theta[:, 0, 2] = (for_left * 2 - 1) * (1 - crop_width)
        theta[:, 1, 2] = (for_top * 2 - 1) * (1 - crop_height)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        cropped = F.grid_sample(
            images.float(), grid, mode=self.interpolation, padding_mode="border", align_corners=False
        )
        return cropped.clamp_(0, 255)


def _between(bounds: tuple[float, float], draws: Tensor) -> Tensor:
    """Map draws from [0, 1) to the interval between the bounds."""
    return bounds[0] + (bounds[1] - bounds[0]) * draws


def _signs(draws: Tensor, probability: float) -> Tensor:
    """Return -1 with the given probability, else 1; (batch,)."""
    return 1.0 - 2.0 * (draws < probability)


class TensorImages(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory with their labels.

    It is indexed with a list of `Place`s and returns a whole batch; the loader collates nothing.

    Args:
        images: (images, channels, height, width), uint8.
        labels: (images,), int64.
        augment: Applied to each batch; `None` returns the images unchanged.
        seed: Seed of the augmentation.

    Raises:
        ValueError: The shapes or dtypes disagree.
    """

    def __init__(self, images: Tensor, labels: Tensor, augment: RandomCropFlip | None = None, seed: int = 0) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(
                "images must be uint8 of shape (images, channels, height, width), got "
                f"{images.dtype} of shape {tuple(images.shape)}"
            )
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be (images,) = {tuple(images.shape[:1])}, got {tuple(labels.shape)}")
        self.images = images
        self.labels = labels
        self.augment = augment
        self._seed = seed
        self._draws: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, places: Sequence[Place]) -> Batch:
        """Read a batch: images (batch, channels, height, width) between 0 and 255, and labels (batch,)."""
        chosen = torch.tensor([place.image for place in places])
        images, labels = self.images[chosen], self.labels[chosen]
        if self.augment is not None:
            positions = torch.tensor([place.position for place in places])
            images = self.augment(images, self._draws_of(places[0].epoch)[positions])
        return images, labels, []

    def _draws_of(self, epoch: int) -> Tensor:
        """Return the draws of an epoch, one row per position; an epoch has at most as many positions as images."""
        if self._draws is None or self._draws[0] != epoch:
            generator = generator_for(Draw.CROP, self._seed, epoch)
            self._draws = epoch, torch.rand(len(self), RandomCropFlip.draws_per_image, generator=generator)
        return self._draws[1]
