"""COCO's format: `annotations/instances_SPLIT.json` beside a folder `SPLIT` of images."""

import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vim.data.coco_masks import decode_mask, describes_pixels
from vim.data.decoding import read_image
from vim.data.instances import Instances
from vim.data.listing import natural_key


class CocoSource:
    """Images of a split in COCO's format and folder layout.

    Categories are sorted by their ids, which may have gaps, and numbered from 1. Nothing is dropped: an object may lack
    area or a mask, and an image may lack objects.

    Args:
        root: Folder with `annotations` and a folder of images for each split.
        split: Name of the split, such as `train2017`.

    Raises:
        ValueError: A file or folder is missing, or the annotations are damaged or contradict themselves.
    """

    def __init__(self, root: Path, split: str) -> None:
        self._folder = root / split
        path = root / "annotations" / f"instances_{split}.json"
        if not self._folder.is_dir():
            raise ValueError(f"data.path {str(root)!r} must have a folder {split!r} of images")
        text = _read(path)
        self.checksum = zlib.crc32(text)
        contents = _parse(text, path)
        try:
            ids = {int(category["id"]): str(category["name"]) for category in contents["categories"]}
            self._labels = {category: label for label, category in enumerate(sorted(ids), start=1)}
            self.class_names = tuple(ids[category] for category in sorted(ids))
            self._images = sorted(contents["images"], key=lambda image: natural_key(image["file_name"]))
            self.image_ids = [int(image["id"]) for image in self._images]
            """COCO's id of each image."""
            if len(set(self.image_ids)) < len(self.image_ids):
                raise ValueError("two images have the same id")
            self._objects = _by_image(contents.get("annotations", []), set(self.image_ids), set(ids))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is not in COCO's format: {_problem(error)}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if not self._images or not ids:
            raise ValueError(f"{path} must have images and categories, got {len(self._images)} and {len(ids)}")
        self.notes = _notes(self._images, self._objects)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> tuple[Image.Image, Instances]:
        """Return an image, decoded and upright, and its objects, crowds included.

        Raises:
            BAD_IMAGE: The file is missing or damaged, it has another size than the annotations say, or a mask is.
        """
        record = self._images[index]
        image = read_image(self.name(index))
        size = (image.height, image.width)
        expected = (record.get("height", size[0]), record.get("width", size[1]))
        if size != expected:
            raise ValueError(
                f"the image is {size[0]} x {size[1]} pixels, and its annotation says {expected[0]} x {expected[1]}"
            )
        return image, self._instances(self._objects[int(record["id"])], size)

    def _instances(self, objects: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> Instances:
        masks = torch.zeros(len(objects), *size, dtype=torch.bool)
        boxes = torch.zeros(len(objects), 4)
        for number, item in enumerate(objects):
            if describes_pixels(item.get("segmentation")):
                masks[number] = decode_mask(item["segmentation"], size)
            boxes[number] = torch.tensor(item["bbox"], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        areas = [item.get("area", item["bbox"][2] * item["bbox"][3]) for item in objects]
        return Instances(
            boxes=boxes,
            labels=torch.tensor([self._labels[int(item["category_id"])] for item in objects], dtype=torch.int64),
            masks=masks,
            crowd=torch.tensor([bool(item.get("iscrowd", 0)) for item in objects], dtype=torch.bool),
            area=torch.tensor(areas, dtype=torch.float32),
        )

    def name(self, index: int) -> str:
        """Return the path of the file."""
        return str(self._folder / self._images[index]["file_name"])

    def keys(self) -> list[str]:
        """Return the path of each file below the folder of the split."""
        return [image["file_name"] for image in self._images]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = f"{path} cannot be read: {error.strerror}"
        raise ValueError(f"data.path must be a folder in COCO's layout: {reason}") from error


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    try:
        contents = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path} is not in COCO's format: it must hold an object, got a {type(contents).__name__}")
    return contents


def _problem(error: KeyError | TypeError) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)


def _by_image(
    annotations: Sequence[Mapping[str, Any]], images: set[int], categories: set[int]
) -> dict[int, list[Mapping[str, Any]]]:
    """Return the annotations of each image.

    Raises:
        ValueError: An annotation has an unknown image or category, or a box that is not four finite numbers.
    """
    found: dict[int, list[Mapping[str, Any]]] = {image: [] for image in images}
    for item in annotations:
        where = f"annotation {item.get('id')}"
        if item["image_id"] not in found:
            raise ValueError(f"{where} is of image {item['image_id']}, which is not in the list of images")
        if item["category_id"] not in categories:
            raise ValueError(f"{where} is of category {item['category_id']}, which is not in the list of categories")
        box = item["bbox"]
        if len(box) != 4 or not all(abs(value) < float("inf") for value in box):
            raise ValueError(f"{where} must have a box of four finite numbers, got {box}")
        found[item["image_id"]].append(item)
    return found


def _notes(images: Sequence[Mapping[str, Any]], objects: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Return in words how many images and objects are unusual, and what becomes of them."""
    counts: Counter[str] = Counter()
    for image in images:
        own = objects[int(image["id"])]
        counts["images without objects"] += not own
        for item in own:
            counts["crowds"] += bool(item.get("iscrowd", 0))
            counts["boxes without area"] += min(item["bbox"][2:]) <= 0
            counts["objects without a mask"] += not describes_pixels(item.get("segmentation"))
    return [f"{count:,} {kind}" for kind, count in counts.items() if count]
