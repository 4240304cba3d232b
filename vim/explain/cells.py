"""Maps of an image of any size, put together from the maps of windows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Cells:
    """A map of an image whose windows a model has seen one by one.

    A window begins at the cell nearest to its first pixel: exactly there if windows begin at multiples of a patch.

    Args:
        window: Height and width of a window in pixels.
        starts: First row and first column of each window.

    Attributes:
        size: Height and width of the windows' union in pixels.
    """

    def __init__(self, window: tuple[int, int], starts: Sequence[tuple[int, int]]) -> None:
        self._window, self._starts = window, tuple(starts)
        tops, lefts = zip(*starts, strict=True)
        self.size = max(tops) + window[0], max(lefts) + window[1]
        self._sum = torch.empty(0)
        self._times = torch.empty(0)

    def add(self, start: tuple[int, int], values: Tensor) -> None:
        """Add the map of a window, (..., rows, columns)."""
        rows, columns = values.shape[-2:]
        cell = self._window[0] / rows, self._window[1] / columns
        if not self._sum.numel():
            shape = [_nearest(length / side) for length, side in zip(self.size, cell, strict=True)]
            self._sum = values.new_zeros(*values.shape[:-2], *shape)
            self._times = values.new_zeros(*shape)
        top, left = (_nearest(place / side) for place, side in zip(start, cell, strict=True))
        self._sum[..., top : top + rows, left : left + columns] += values
        self._times[top : top + rows, left : left + columns] += 1

    def sum(self) -> Tensor:
        """Return the sums over the windows that share a cell, (..., rows, columns)."""
        return self._sum

    def mean(self) -> Tensor:
        """Return the means over the windows that share a cell, (..., rows, columns)."""
        return self._sum / self._times.clamp_min(1)

    def windows_at_pixels(self) -> Tensor:
        """Return the number of windows that share each pixel, (height, width)."""
        times = torch.zeros(self.size)
        for top, left in self._starts:
            times[top : top + self._window[0], left : left + self._window[1]] += 1
        return times


def cut_to_image(maps: Tensor, size: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Return maps at the pixels of an image, (maps, height, width).

    Args:
        maps: (maps, rows, columns).
        size: Height and width in pixels of what the maps cover, from the image's first pixel on.
        shape: Height and width of the image.
    """
    pixels = F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    return pixels[:, : shape[0], : shape[1]]


def _nearest(number: float) -> int:
    """Return the nearest whole number; halves always go up, so that sums of cells stay within the map."""
    return int(number + 0.5)
