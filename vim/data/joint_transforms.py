"""Random resize, crop, flip and colours of an image together with its mask, by torchvision's transforms."""

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from vim.config.schema import TrainConfig
from vim.data.masks import NO_CLASS
from vim.data.preprocessing import Preprocessing

_TRIES = 10  # crops to draw before one that a single class fills is taken
# Of mmsegmentation: brightness of up to 32 of 256 levels, hue of up to 18 of 180 degrees and so on, each with p = 0.5.
_JITTERS: tuple[dict[str, Any], ...] = (
    {"brightness": (0.875, 1.125)},
    {"contrast": (0.5, 1.5)},
    {"saturation": (0.5, 1.5)},
    {"hue": (-0.05, 0.05)},
)


class JointTransform:
    """The augmentation of a training image and its mask; it draws from torch's global generator.

    Args:
        config: The settings of the run.
    """

    def __init__(self, config: TrainConfig) -> None:
        own = config.segmentation
        self._shape = config.model.image_shape
        self._short_side, self._scale = own.short_side, own.scale
        self._category_ratio = own.category_ratio
        self._fill = [round(255 * value) for value in Preprocessing.from_config(config).mean]
        jitters = [v2.RandomApply([v2.ColorJitter(**jitter)]) for jitter in _JITTERS] if own.photometric else []
        flips = [v2.RandomHorizontalFlip(config.augment.hflip), v2.RandomVerticalFlip(config.augment.vflip)]
        self._rest = v2.Compose([*flips, *jitters])

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Transform a pair.

        Args:
            image: (channels, height, width), uint8.
            mask: (height, width), uint8 labels.

        Returns:
            The same kinds of tensors, of the size of the model's input. Where the resized image is smaller than that,
            the image is padded with its mean, and the mask with pixels without a class.
        """
        low, high = self._scale
        factor = low + (high - low) * float(torch.rand(()))
        size = resized_shape((image.shape[-2], image.shape[-1]), self._short_side, factor)
        pair = tv_tensors.Image(image), tv_tensors.Mask(mask)
        pair = functional.resize(pair[0], list(size)), functional.resize(pair[1], list(size))
        return self._rest(*self._crop(*pair))

    def _crop(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        height, width = self._shape
        missing = [max(0, width - image.shape[-1]), max(0, height - image.shape[-2])]
        if any(missing):
            image = functional.pad(image, [0, 0, *missing], fill=self._fill)
            mask = functional.pad(mask, [0, 0, *missing], fill=NO_CLASS)
        for _ in range(_TRIES):
            top = int(torch.randint(image.shape[-2] - height + 1, ()))
            left = int(torch.randint(image.shape[-1] - width + 1, ()))
            cropped = functional.crop(mask, top, left, height, width)
            if self._category_ratio == 1 or largest_share(cropped) < self._category_ratio:
                break
        return functional.crop(image, top, left, height, width), cropped


def resized_shape(shape: tuple[int, int], short_side: int | None, factor: float = 1.0) -> tuple[int, int]:
    """Return height and width of an image whose shorter side becomes `short_side` (`None`: stays), times a factor."""
    scale = factor if short_side is None else factor * short_side / min(shape)
    height, width = (max(1, round(length * scale)) for length in shape)
    return height, width


def largest_share(mask: Tensor) -> float:
    """Return the share of the most frequent class among the pixels with a class; 1 without such pixels."""
    counts = torch.bincount(mask.flatten(), minlength=NO_CLASS + 1)[:NO_CLASS]
    total = int(counts.sum())
    return float(counts.max()) / total if total else 1.0
