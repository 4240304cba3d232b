"""Preprocessing at evaluation: from an image to the input of a model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from vim.config.schema import TrainConfig
from vim.data.decoding import to_color_mode, upright

_COLOR_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """Resize, centre crop and normalisation of an image, as at evaluation."""

    image_shape: tuple[int, int]
    """Height and width of the input in pixels."""
    in_chans: int
    """Channels of the input."""
    mean: tuple[float, ...]
    """Mean of each channel, for pixels between 0 and 1."""
    std: tuple[float, ...]
    """Standard deviation of each channel, for pixels between 0 and 1."""
    crop_pct: float
    """Side of the crop, relative to the side of the resized image."""
    interpolation: str
    """Resampling, by its name in PIL."""
    bits: int = 16
    """Bits in use of a 16-bit grey image."""

    @classmethod
    def from_config(cls, config: TrainConfig) -> "Preprocessing":
        """Return the preprocessing of a training run."""
        in_chans = config.model.in_chans
        return cls(
            image_shape=config.model.image_shape,
            in_chans=in_chans,
            mean=per_channel(config.data.mean, in_chans),
            std=per_channel(config.data.std, in_chans),
            crop_pct=config.data.crop_pct,
            interpolation=config.data.interpolation,
            bits=config.data.bits,
        )

    @classmethod
    def from_model(cls, model: nn.Module) -> "Preprocessing":
        """Return the preprocessing of a timm model's published weights."""
        data = resolve_model_data_config(model)
        in_chans, height, width = data["input_size"]
        return cls(
            image_shape=(height, width),
            in_chans=in_chans,
            mean=per_channel(data["mean"], in_chans),
            std=per_channel(data["std"], in_chans),
            crop_pct=data["crop_pct"],
            interpolation=data["interpolation"],
        )

    def as_photograph(self, pixels: Tensor) -> Tensor:
        """Undo the normalisation of an input, (channels, height, width): pixels from 0 to 1."""
        mean, std = (torch.tensor(x, device=pixels.device)[:, None, None] for x in (self.mean, self.std))
        return pixels * std + mean

    @property
    def color_mode(self) -> str:
        """The mode of PIL that an image is converted to.

        Raises:
            ValueError: Images cannot have this number of channels.
        """
        if self.in_chans not in _COLOR_MODES:
            raise ValueError(
                f"model.in_chans must be one of {sorted(_COLOR_MODES)} to read image files, got {self.in_chans}"
            )
        return _COLOR_MODES[self.in_chans]

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Shape of one input, (in_chans, height, width)."""
        return (self.in_chans, *self.image_shape)

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """Return a function that maps an image to an input, (in_chans, height, width), float32.

        Raises:
            ValueError: Images cannot have this number of channels.
        """
        mode, bits = self.color_mode, self.bits
        resize_and_normalise: Any = create_transform(
            self.input_size,
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
        )
        return lambda image: resize_and_normalise(to_color_mode(upright(image), mode, bits))


def per_channel(values: tuple[float, ...], in_chans: int) -> tuple[float, ...]:
    """Return one value per channel; a single value is used for all channels.

    Raises:
        ValueError: The number of values is neither 1 nor `in_chans`.
    """
    if len(values) not in (1, in_chans):
        raise ValueError(f"values must be one number or one for each of in_chans = {in_chans} channels, got {values}")
    return tuple(values) * in_chans if len(values) == 1 else tuple(values)
