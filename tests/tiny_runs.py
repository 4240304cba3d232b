"""What the tests of training share: settings of a run that takes a second, and folders of images."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vim.config.schema import TrainConfig

# Four patches and a class token through one narrow block.
TINY_MODEL = {"patch_size": 8, "embed_dim": 16, "depth": 1, "d_state": 4}
TINY_OPTIONS = [
    *("--model.img_size", "16", "--model.args", str(TINY_MODEL)),
    *("--epochs", "1", "--schedule.warmup_epochs", "0", "--device", "cpu", "--log.report", "false"),
]


def tiny_config(**changes: Any) -> TrainConfig:
    """Settings of a short run on 48 synthetic images; `group__name=value` changes a setting in a group."""
    changes = {
        "epochs": 1,
        "batch_size": 16,
        "micro_batch_size": 16,
        "device": "cpu",
        "model__img_size": 16,
        "model__args": TINY_MODEL,
        "data__dataset": "synthetic",
        "data__synthetic_images": 48,
        "schedule__warmup_epochs": 0,
        **changes,
    }
    return change(TrainConfig(), **changes)


def change(config: TrainConfig, **changes: Any) -> TrainConfig:
    """Replace settings of a run; `group__name=value` changes a setting in a group."""
    groups: dict[str, dict[str, Any]] = {}
    top = {}
    for name, value in changes.items():
        group, _, leaf = name.rpartition("__")
        if group:
            groups.setdefault(group, {})[leaf] = value
        else:
            top[name] = value
    parts = {group: dataclasses.replace(getattr(config, group), **values) for group, values in groups.items()}
    return dataclasses.replace(config, **top, **parts)


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_image_folder(
    root: Path, classes: list[str], counts: dict[str, int], size: tuple[int, int] = (40, 30), suffix: str = ".jpg"
) -> Path:
    """Write `root/split/class/index.jpg`: random images, each class with a colour of its own."""
    random = np.random.default_rng(0)
    for split, count in counts.items():
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            color = np.array([(label * 97) % 256, (label * 53 + 80) % 256, (255 - label * 61) % 256])
            for index in range(count):
                pixels = color // 2 + random.integers(0, 128, (size[1], size[0], 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}{suffix}")
    return root


# A Vim without class token on crops of 32 pixels, and narrow heads.
TINY_SEGMENTER = {
    "task": "segmentation",
    "model__in_chans": 3,
    "model__img_size": 32,
    "model__args": {**TINY_MODEL, "depth": 2, "cls_position": "none"},
    "data__mean": (0.4,),
    "data__std": (0.2,),
    "segmentation__channels": 8,
    "segmentation__aux_channels": 8,
    "batch_size": 4,
    "micro_batch_size": 4,
}


def write_pairs(
    root: Path,
    counts: dict[str, int],
    size: tuple[int, int] = (40, 36),
    layout: tuple[str, str] = ("images/{}", "masks/{}"),
    values: tuple[int, ...] = (0, 1, 2),
) -> Path:
    """Write random images of (width, height) and masks: a stripe of each value, with a colour of its own."""
    random = np.random.default_rng(0)
    for split, count in counts.items():
        folders = [root / part.format(split) for part in layout]
        for folder in folders:
            folder.mkdir(parents=True)
        for index in range(count):
            edges = np.sort(random.integers(4, size[0] - 4, len(values) - 1))
            labels = np.broadcast_to(np.searchsorted(edges, np.arange(size[0]), side="right"), (size[1], size[0]))
            pixels = np.stack([60 + 60 * labels, 200 - 50 * labels, 0 * labels + 90], 2)
            noisy = (pixels + random.normal(0, 10, pixels.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folders[0] / f"{index}.png")
            mask = np.array(values)[labels]
            Image.fromarray(mask.astype(np.uint8 if max(values) < 256 else np.uint16)).save(folders[1] / f"{index}.png")
    return root
