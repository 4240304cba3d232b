"""A small folder in COCO's format, with what real ones have: gaps, crowds, polygons, run lengths, nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 90, "name": "cat"}, {"id": 3, "name": "ant"}, {"id": 17, "name": "bee"}]
WIDTH, HEIGHT = 48, 32


def rectangle(left, top, width, height):
    """Return a polygon around whole pixels."""
    return [left, top, left + width, top, left + width, top + height, left, top + height]


def annotation(image_id, category_id, box, **changes):
    """Return an object that fills its box."""
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(box),
        "area": box[2] * box[3],
        "iscrowd": 0,
        "segmentation": [rectangle(*box)],
    } | changes


def run_lengths(left, top, width, height, size=(HEIGHT, WIDTH)):
    """Return the run lengths of a rectangle, as numbers."""
    mask = np.zeros(size, dtype=bool)
    mask[top : top + height, left : left + width] = True
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, len(flat)]).tolist()
    return {"size": list(size), "counts": counts if not flat[0] else [0, *counts]}


def write_split(root: Path, split: str, annotations, images=4, size=(WIDTH, HEIGHT), categories=None) -> Path:
    """Write `root/split/*.png` and `root/annotations/instances_split.json`; image n has the id 10 n."""
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    records = []
    for number in range(images):
        pixels = random.integers(0, 60, (size[1], size[0], 3), dtype=np.uint8)
        for item in annotations:
            if item["image_id"] == 10 * number:
                left, top, width, height = (round(value) for value in item["bbox"])
                color = [200 if item["category_id"] == own["id"] else 20 for own in CATEGORIES]
                pixels[top : top + height, left : left + width] = color
        Image.fromarray(pixels).save(root / split / f"{number}.png")
        records.append({"id": 10 * number, "file_name": f"{number}.png", "width": size[0], "height": size[1]})
    contents = {
        "images": records,
        "categories": CATEGORIES if categories is None else categories,
        "annotations": [{"id": number, **item} for number, item in enumerate(annotations, start=1)],
    }
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(contents))
    return root


def plain_objects(images, seed=0):
    """Return one or two rectangles for each image."""
    random = np.random.default_rng(seed)
    objects = []
    for number in range(images):
        for _ in range(int(random.integers(1, 3))):
            width, height = (int(side) for side in random.integers(8, 20, 2))
            left, top = int(random.integers(WIDTH - width)), int(random.integers(HEIGHT - height))
            category = CATEGORIES[int(random.integers(3))]["id"]
            objects.append(annotation(10 * number, category, (left, top, width, height)))
    return objects
