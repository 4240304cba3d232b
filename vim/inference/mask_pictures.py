"""Masks as pictures: a colour for each class, and images beside truth and prediction."""

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from vim.checkpoints.io import atomic_writer
from vim.data.masks import NO_CLASS

_GOLDEN = 0.618034  # of a turn: neighbouring classes get distant hues
_GAP = 4  # pixels between pictures
_MOST_PIXELS = 512  # on the longer side of a picture in a table


class Example(NamedTuple):
    """A held-out image with its mask and the prediction."""

    image: Tensor
    """(in_chans, height, width), uint8."""
    mask: Tensor
    """(height, width), labels."""
    labels: Tensor
    """(height, width), predicted labels."""


def palette(num_classes: int) -> np.ndarray:
    """Return a colour for each label, (256, 3), uint8: black for the first class, white for pixels without one."""
    colors = np.zeros((256, 3), dtype=np.uint8)
    for label in range(1, num_classes):
        value = 0.95 if label % 2 else 0.7
        colors[label] = [round(255 * part) for part in colorsys.hsv_to_rgb(label * _GOLDEN % 1, 0.75, value)]
    colors[NO_CLASS] = 255
    return colors


def mask_image(labels: Tensor, num_classes: int) -> Image.Image:
    """Return labels (height, width) as an image whose pixels are the labels, with a palette to look at."""
    image = Image.fromarray(labels.numpy().astype(np.uint8))
    image.putpalette(palette(num_classes).tobytes())
    return image


def overlay(image: Image.Image, labels: Tensor, num_classes: int, strength: float = 0.5) -> Image.Image:
    """Return an image in colour with the classes other than the first painted over it."""
    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    found = labels.numpy()
    painted = palette(num_classes)[found]
    share = strength * (found > 0)[..., None]
    return Image.fromarray((pixels + share * (painted - pixels)).round().astype(np.uint8))


def draw_examples(examples: Sequence[Example], num_classes: int, path: Path) -> None:
    """Write a PNG file with a row for each image: the image, its mask and the prediction.

    Args:
        examples: At least one.
        num_classes: Number of classes.
        path: The file to create or replace.
    """
    rows = [[_fit(part) for part in _parts(example, num_classes)] for example in examples]
    width = max(sum(part.width + _GAP for part in row) for row in rows) - _GAP
    height = sum(row[0].height + _GAP for row in rows) - _GAP
    sheet, top = Image.new("RGB", (width, height), "white"), 0
    for row in rows:
        left = 0
        for part in row:
            sheet.paste(part, (left, top))
            left += part.width + _GAP
        top += row[0].height + _GAP
    with atomic_writer(path) as file:
        sheet.save(file, format="PNG")


def image_of(pixels: Tensor) -> Image.Image:
    """Return pixels (in_chans, height, width), uint8, as an image; of four channels the first three."""
    array = pixels[:3].permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def _parts(example: Example, num_classes: int) -> list[Image.Image]:
    masks = [mask_image(labels, num_classes).convert("RGB") for labels in (example.mask, example.labels)]
    return [image_of(example.image).convert("RGB"), *masks]


def _fit(image: Image.Image) -> Image.Image:
    factor = _MOST_PIXELS / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image if factor >= 1 else image.resize(size, Image.Resampling.NEAREST)
