"""Masks in COCO's three forms: polygons, and run lengths as numbers or as text."""

from typing import Any

import torch
from torch import Tensor

_CORNERS = 3  # of the smallest polygon


def describes_pixels(segmentation: Any) -> bool:
    """Return True if a segmentation is run lengths, or has a polygon with at least three corners."""
    if isinstance(segmentation, dict):
        return bool(segmentation.get("counts"))
    return isinstance(segmentation, list) and any(_is_polygon(part) for part in segmentation)


def decode_mask(segmentation: Any, size: tuple[int, int]) -> Tensor:
    """Return the pixels of an object, (height, width), bool.

    Args:
        segmentation: Polygons, or run lengths.
        size: Height and width of the image.

    Raises:
        ValueError: The run lengths are of another size or damaged.
        ModuleNotFoundError: faster-coco-eval is not installed.
    """
    from faster_coco_eval.core import mask

    if isinstance(segmentation, dict):
        own = tuple(segmentation.get("size", ()))
        if own != size:
            raise ValueError(f"a mask must be of the image's size {size}, got {own}")
    else:
        segmentation = [[float(value) for value in part] for part in segmentation if _is_polygon(part)]
    runs = mask.segmToRle(segmentation, size[1], size[0])
    return torch.from_numpy(mask.decode(runs)).bool()


def _is_polygon(part: Any) -> bool:
    return isinstance(part, list) and len(part) >= 2 * _CORNERS
