"""Pictures of objects: boxes with class and score, and masks, over the image."""

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from vim.checkpoints.io import atomic_writer
from vim.data.instances import Instances

_GOLDEN = 0.618034  # of a turn: neighbouring classes get distant hues
_SHOWN_SCORE = 0.5
_MASK_THRESHOLD = 0.5
_SIDE = 512  # pixels of the longer side of a picture in a table


class Example(NamedTuple):
    """A held-out image with its objects and the detections."""

    image: Tensor
    """(in_chans, height, width), uint8."""
    truth: dict[str, Tensor]
    """`boxes`, `labels` and `masks` (n, height, width), bool."""
    found: dict[str, Tensor]
    """`boxes`, `labels`, `scores` and, if the model predicts them, `masks` (n, 1, height, width)."""

    @classmethod
    def of(cls, image: Tensor, truth: Instances, found: dict[str, Tensor]) -> "Example":
        """Return an example, on the CPU."""
        objects = {"boxes": truth.boxes, "labels": truth.labels, "masks": truth.masks}
        return cls(image, objects, {name: tensor.cpu() for name, tensor in found.items()})


def confident(found: dict[str, Tensor], score: float = _SHOWN_SCORE) -> dict[str, Tensor]:
    """Return the detections with at least a score, with masks as (n, height, width), bool."""
    keep = found["scores"] >= score
    chosen = {name: tensor[keep] for name, tensor in found.items()}
    if "masks" in chosen:
        chosen["masks"] = chosen["masks"][:, 0] > _MASK_THRESHOLD
    return chosen


def draw_objects(image: Tensor, objects: dict[str, Tensor], class_names: Sequence[str]) -> Tensor:
    """Return an image with boxes, names and masks drawn over it, (3, height, width), uint8.

    Args:
        image: (1, 3 or 4 channels, height, width), uint8.
        objects: `boxes`, `labels` from 1, and if known `scores` and `masks` (n, height, width), bool.
        class_names: Name of each class.
    """
    picture = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    labels = objects["labels"].tolist()
    if not labels:
        return picture.clone()
    colors = [_color(label) for label in labels]
    if "masks" in objects:
        masks = objects["masks"].cpu()
        for index in reversed(range(len(labels))):  # one by one: where masks overlap, the first one is on top
            picture = draw_segmentation_masks(picture, masks[index], alpha=0.5, colors=colors[index])
    names = [class_names[label - 1] for label in labels]
    if "scores" in objects:
        names = [f"{name} {score:.2f}" for name, score in zip(names, objects["scores"].tolist(), strict=True)]
    boxes = objects["boxes"].cpu()
    if not (boxes[:, 2:] >= boxes[:, :2]).all():  # a negative side, which torchvision refuses
        boxes = torch.cat([torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])], dim=1)
    return draw_bounding_boxes(picture, boxes, names, colors=colors, width=max(1, min(image.shape[1:]) // 200))


def draw_enlarged(image: Tensor, objects: dict[str, Tensor], class_names: Sequence[str]) -> Tensor:
    """Return an image at the size of pictures in tables, with boxes, names and masks drawn over it.

    Args:
        image: (1, 3 or 4 channels, height, width), uint8.
        objects: See `draw_objects`; none for the image alone.
        class_names: Name of each class.
    """
    large, scale = _enlarge(image)
    resized = _scaled(objects, scale, large.shape[1:]) if objects else {"labels": torch.empty(0)}
    return draw_objects(large, resized, class_names)


def draw_examples(examples: Sequence[Example], class_names: Sequence[str], path: Path) -> None:
    """Write a PNG file with a row for each image: the image, its objects, and the confident detections."""
    pictures = []
    for image, truth, found in examples:
        pictures += [draw_enlarged(image, objects, class_names) for objects in ({}, truth, confident(found))]
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (1, 2))
    padded = [F.pad(p, (0, width - p.shape[2], 0, height - p.shape[1]), value=255) for p in pictures]
    table = make_grid(padded, nrow=3, padding=4, pad_value=255)
    with atomic_writer(path) as file:
        Image.fromarray(table.permute(1, 2, 0).numpy()).save(file, format="png")


def _enlarge(image: Tensor) -> tuple[Tensor, float]:
    """Return an image resized to the longer side of a picture in a table, and its scale."""
    scale = _SIDE / max(image.shape[1:])
    size = [max(1, round(length * scale)) for length in image.shape[1:]]
    return F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0].round().byte(), scale


def _scaled(objects: dict[str, Tensor], scale: float, size: Sequence[int]) -> dict[str, Tensor]:
    scaled = objects | {"boxes": objects["boxes"] * scale}
    if "masks" in objects:
        masks = objects["masks"][:, None].float()
        scaled["masks"] = F.interpolate(masks, tuple(size))[:, 0] > _MASK_THRESHOLD
    return scaled


def _color(label: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(label * _GOLDEN % 1, 0.75, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)
