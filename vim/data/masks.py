"""Masks of segmentation: read from files, and turned into labels."""

import os
from collections.abc import Sequence
from typing import IO

import numpy as np

from vim.data.decoding import read_image

NO_CLASS = 255
"""Label of pixels without a class."""
_SHOWN = 5  # values in a message
_WORDS = 2**16


def read_mask(file: str | os.PathLike[str] | IO[bytes]) -> np.ndarray:
    """Return the values of a mask file, (height, width), uint8 or uint16.

    The file is grey with 1, 8 or 16 bits, has a palette, whose indices are the values, or repeats one value in every
    colour.

    Raises:
        BAD_IMAGE: The file cannot be decoded, or its pixels are not values of classes.
    """
    image = read_image(file)
    values = np.asarray(image)
    if values.ndim == 3:
        colors = values[..., :3] if image.mode in ("RGB", "RGBA") else values[..., :1]
        if image.mode not in ("RGB", "RGBA", "LA") or (colors != colors[..., :1]).any():
            raise ValueError(
                f"its mask is a colour picture (mode {image.mode!r}): a mask holds the number of a class in each pixel"
            )
        values = values[..., 0]
    if values.dtype == bool:
        return values.astype(np.uint8)
    if values.dtype.kind not in "iu":
        raise ValueError(f"its mask has pixels of {values.dtype} (mode {image.mode!r}), and must have whole numbers")
    if values.size and (values.min() < 0 or values.max() >= _WORDS):
        raise ValueError(f"its mask must have values from 0 to 65535, got {values.min()} to {values.max()}")
    return values if values.dtype == np.uint8 else values.astype(np.uint16)


class MaskLabels:
    """A map from the values in masks to labels.

    Args:
        num_classes: Number of classes.
        values: Value of each class; empty is 0, 1, 2 and so on.
        ignore: Values of pixels without a class.
    """

    def __init__(self, num_classes: int, values: Sequence[int] = (), ignore: Sequence[int] = ()) -> None:
        self._values = tuple(values) or tuple(range(num_classes))
        self._ignore = tuple(ignore)
        self._label_of = np.zeros(_WORDS, dtype=np.uint8)
        self._is_known = np.zeros(_WORDS, dtype=bool)
        for value in self._ignore:
            self._label_of[value], self._is_known[value] = NO_CLASS, True
        for label, value in enumerate(self._values):  # after the ignored values, which a class may have too
            self._label_of[value], self._is_known[value] = label, True

    def __call__(self, mask: np.ndarray) -> np.ndarray:
        """Return labels, (height, width), uint8, with `NO_CLASS` for pixels without a class.

        Args:
            mask: (height, width), uint8 or uint16.

        Raises:
            ValueError: A value belongs to no class; the message names some of the values.
        """
        known = self._is_known[mask]
        if not known.all():
            unknown = np.unique(mask[~known])
            shown = ", ".join(map(str, unknown[:_SHOWN].tolist())) + (", ..." if len(unknown) > _SHOWN else "")
            raise ValueError(f"its mask has the value{'s' * (len(unknown) > 1)} {shown}, and {self._describe()}")
        return self._label_of[mask]

    def _describe(self) -> str:
        values = self._values
        is_range = values == tuple(range(values[0], values[0] + len(values)))
        words = f"{values[0]} to {values[-1]}" if is_range else ", ".join(map(str, values[:_SHOWN]))
        others = ", ".join(map(str, self._ignore))
        ignored = f" or {others} (segmentation.ignore_value)" if others else ""
        return f"must have {words} (segmentation.mask_values, {len(values)} classes){ignored}"
