"""Scenes of several handwritten digits on a textured background, with the mask and the label of each digit.

The digits come with scikit-learn. A split has digits of its own, so that no held-out digit is seen in training.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from vim.data.digits import CLASS_NAMES, load_small_digits

__all__ = ["CLASS_NAMES", "DigitScenes", "Scene"]

_SPLITS = ("train", "val")
_ASPECTS = (0.8, 1.25)  # width of a digit, relative to its height
_INK = 0.25  # strength from which a pixel belongs to a digit
_VISIBLE = 0.6  # share of a digit that the digits in front of it must leave uncovered
_TRIES = 20  # places to try for a digit
_CELLS = 5  # of the background's texture along a side
_NOISE = 8.0  # standard deviation of the noise of single pixels, in grey levels


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A picture of digits. No two masks overlap: a digit in front hides a part of the one behind."""

    image: np.ndarray
    """(size, size, 3), uint8."""
    masks: np.ndarray
    """Visible pixels of each digit, (digits, size, size), bool; each mask has pixels."""
    labels: np.ndarray
    """Label of each digit, (digits,), int64; index into `CLASS_NAMES`."""


class _Box(NamedTuple):
    top: int
    left: int
    height: int
    width: int

    def covered(self, other: "_Box") -> float:
        """Return the area that two boxes share, relative to the smaller one."""
        height = min(self.top + self.height, other.top + other.height) - max(self.top, other.top)
        width = min(self.left + self.width, other.left + other.width) - max(self.left, other.left)
        return max(0, height) * max(0, width) / min(self.height * self.width, other.height * other.width)


class DigitScenes(Sequence[Scene]):
    """A sequence of scenes, each a function of its index and of all arguments but the count.

    Args:
        split: `train` or `val`.
        size: Side of a scene in pixels, at least 32.
        count: Number of scenes.
        seed: Seed of the scenes.
        most_digits: Most digits in a scene.
        sides: Smallest and largest height of a digit, relative to the scene.
        overlap: Largest share of a digit's box that the box of one other digit may cover.

    Raises:
        ValueError: An argument is out of range.
        ModuleNotFoundError: scikit-learn is not installed.
    """

    def __init__(
        self,
        split: str,
        size: int,
        count: int,
        seed: int,
        most_digits: int = 5,
        sides: tuple[float, float] = (0.3, 0.5),
        overlap: float = 1.0,
    ) -> None:
        if split not in _SPLITS:
            raise ValueError(f"split must be one of {', '.join(map(repr, _SPLITS))}, got {split!r}")
        if size < 32:
            raise ValueError(f"size must be >= 32, or digits would be illegible, got {size}")
        if count < 1:
            raise ValueError(f"count must be >= 1, got {count}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        if most_digits < 1:
            raise ValueError(f"most_digits must be >= 1, got {most_digits}")
        if not 0.1 <= sides[0] <= sides[1] <= 1:
            raise ValueError(f"sides must rise from >= 0.1 to <= 1, got {sides}")
        if not 0 <= overlap <= 1:
            raise ValueError(f"overlap must be from 0 to 1, got {overlap}")
        self.split, self.size, self.seed = split, size, seed
        self._count, self._most_digits, self._sides, self._overlap = count, most_digits, sides, overlap
        train, held_out = load_small_digits()
        self._digits, self._labels = train if split == "train" else held_out

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Scene:  # type: ignore[override]
        """Compose a scene.

        Raises:
            IndexError: The index is out of range.
        """
        if not 0 <= index < self._count:
            raise IndexError(f"index must be from 0 to {self._count - 1}, got {index}")
        random = np.random.default_rng((self.seed, _SPLITS.index(self.split), index))
        canvas = self._background(random)
        masks: list[np.ndarray] = []
        boxes: list[_Box] = []
        labels: list[int] = []
        for _ in range(int(random.integers(1, self._most_digits + 1))):
            chosen = int(random.integers(len(self._labels)))
            placed = self._place(random, self._digits[chosen], masks, boxes)
            if placed is None:
                continue
            ink, box = placed
            boxes.append(box)
            color = random.uniform(170, 255, 3)
            canvas += ink[..., None] * (color - canvas)
            front = ink > _INK
            masks = [*(mask & ~front for mask in masks), front]
            labels.append(int(self._labels[chosen]))
        canvas += random.normal(0, _NOISE, canvas.shape)
        return Scene(
            image=canvas.round().clip(0, 255).astype(np.uint8),
            masks=np.stack(masks),
            labels=np.array(labels, dtype=np.int64),
        )

    def _background(self, random: np.random.Generator) -> np.ndarray:
        """Return a smooth texture darker than every digit, (size, size, 3), float64."""
        return _enlarge(random.uniform(0, 90, (_CELLS, _CELLS, 3)), self.size, self.size)

    def _place(
        self, random: np.random.Generator, digit: np.ndarray, behind: list[np.ndarray], boxes: list[_Box]
    ) -> tuple[np.ndarray, _Box] | None:
        """Return the ink of a digit, (size, size), 0 to 1, and its box; `None` if every place tried hides too much."""
        low, high = (round(share * self.size) for share in self._sides)
        for _ in range(_TRIES):
            height = int(random.integers(low, high + 1))
            width = min(self.size, round(height * random.uniform(*_ASPECTS)))
            top, left = (int(random.integers(self.size - side + 1)) for side in (height, width))
            box = _Box(top, left, height, width)
            if any(box.covered(other) > self._overlap for other in boxes):
                continue
            ink = np.zeros((self.size, self.size))
            ink[top : top + height, left : left + width] = _enlarge(digit[..., None], height, width)[..., 0].clip(0, 1)
            front = ink > _INK
            if all((mask & ~front).sum() >= _VISIBLE * mask.sum() for mask in behind):
                return ink, box
        return None


def _enlarge(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return (rows, columns, channels) as (height, width, channels), by bicubic interpolation."""
    channels = torch.from_numpy(values).permute(2, 0, 1)[None]
    enlarged = F.interpolate(channels, (height, width), mode="bicubic", align_corners=False, antialias=True)
    return enlarged[0].permute(1, 2, 0).numpy().copy()
