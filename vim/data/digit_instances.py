"""Scenes of digits as images with objects."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.ops import masks_to_boxes

from vim.data.digit_scenes import CLASS_NAMES, DigitScenes
from vim.data.instances import Instances


class DigitInstances:
    """Scenes of digits as a source of images with objects.

    Args:
        scenes: The scenes.
    """

    class_names = CLASS_NAMES
    notes: tuple[str, ...] = ()

    def __init__(self, scenes: DigitScenes) -> None:
        self._scenes = scenes
        self.checksum = scenes.seed

    def __len__(self) -> int:
        return len(self._scenes)

    def read(self, index: int) -> tuple[Image.Image, Instances]:
        """Return a scene and its digits."""
        scene = self._scenes[index]
        return Image.fromarray(scene.image), instances_from_masks(scene.masks, scene.labels + 1)

    def name(self, index: int) -> str:
        """Return the split and the number of a scene."""
        return f"scene {index} of {self._scenes.split}"

    def keys(self) -> list[str]:
        """Return the number of each scene."""
        return [str(index) for index in range(len(self))]


def instances_from_masks(masks: "np.ndarray[Any, Any]", labels: "np.ndarray[Any, Any]") -> Instances:
    """Return the objects with these masks, (objects, height, width), each with pixels, and these labels, from 1."""
    pixels = torch.from_numpy(masks)
    boxes = masks_to_boxes(pixels)
    boxes[:, 2:] += 1  # from the last pixel to the edge behind it
    return Instances(
        boxes=boxes,
        labels=torch.from_numpy(labels),
        masks=pixels,
        crowd=torch.zeros(len(pixels), dtype=torch.bool),
        area=pixels.flatten(1).sum(dim=1).float(),
    )
