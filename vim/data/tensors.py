"""Images that fit in memory, read, cropped and flipped a batch at a time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomCropFlip:
    """A random crop of each image, resized back to the whole, and random flips; one call for a whole batch.

    The crop is drawn as `torchvision.transforms.RandomResizedCrop` draws it (area uniform, aspect ratio uniform in its
    logarithm, place uniform), except that a side longer than the image is cut to the image instead of drawn again.
    """

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

    def __call__(self, images: Tensor) -> Tensor:
        """Crop and flip a batch.

        Args:
            images: (batch, channels, height, width), pixels between 0 and 255; any dtype.

        Returns:
            The same shape, float32, still between 0 and 255.
        """
        batch, _, height, width = images.shape
        area = torch.empty(batch).uniform_(*self.scale)
        log_ratio = torch.empty(batch).uniform_(*(math.log(bound) for bound in self.ratio))
        aspect = log_ratio.exp() * (height / width)  # of the crop, in units of the image's sides
        crop_width = (area * aspect).sqrt().clamp(max=1.0)
        crop_height = (area / aspect).sqrt().clamp(max=1.0)
        # Sides and centres in the coordinates of grid_sample, where the image spans -1 to 1.
        theta = torch.zeros(batch, 2, 3)
        theta[:, 0, 0] = crop_width * self._signs(batch, self.hflip)
        theta[:, 1, 1] = crop_height * self._signs(batch, self.vflip)
        theta[:, 0, 2] = (torch.rand(batch) * 2 - 1) * (1 - crop_width)
        theta[:, 1, 2] = (torch.rand(batch) * 2 - 1) * (1 - crop_height)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        cropped = F.grid_sample(
            images.float(), grid, mode=self.interpolation, padding_mode="border", align_corners=False
        )
        return cropped.clamp_(0, 255)

    @staticmethod
    def _signs(batch: int, probability: float) -> Tensor:
        """Return -1 with the given probability, else 1; (batch,)."""
        return 1.0 - 2.0 * (torch.rand(batch) < probability)


class TensorImages(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory with their labels.

    A loader over it must use `keep_batch` to collate: a batch is indexed at once and arrives whole.

    Args:
        images: (images, channels, height, width), uint8.
        labels: (images,), int64.
        augment: Applied to each batch that is read; `None` hands the images out as they are.

    Raises:
        ValueError: The shapes or dtypes disagree.
    """

    def __init__(self, images: Tensor, labels: Tensor, augment: RandomCropFlip | None = None) -> None:
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

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Read a batch: images (batch, channels, height, width) between 0 and 255, and labels (batch,)."""
        chosen = torch.as_tensor(indices)
        images = self.images[chosen]
        return (images if self.augment is None else self.augment(images)), self.labels[chosen]


def keep_batch(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Collate nothing: `TensorImages` hands out whole batches."""
    return batch
