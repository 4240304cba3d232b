"""The two splits of images with objects, by the name in `data.dataset`, and loaders over them."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from vim.config.schema import TrainConfig
from vim.data.coco import CocoSource
from vim.data.digit_instances import DigitInstances
from vim.data.digit_scenes import DigitScenes
from vim.data.instance_images import InstanceImages
from vim.data.instance_transforms import InstanceTransform
from vim.data.instances import InstanceSource
from vim.data.loaders import open_loader
from vim.data.order import EvalOrder, TrainOrder
from vim.data.preprocessing import Preprocessing

_SCENES_SEED = 0  # not the run's: runs with other seeds are compared on the same scenes
_HELD_OUT_SHARE = 4  # one held-out scene of digits for so many training scenes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class InstanceLoaders:
    """Loaders over both splits, in the order that the seed and the position in the run determine."""

    train: "DataLoader[Any]"
    """Yields `TrainBatch`: the micro-batches of this process, in whole optimizer steps."""
    val: "DataLoader[Any]"
    """Yields `EvalBatch`: the share of this process in the held-out images, each once."""
    order: TrainOrder
    """Order of the training images."""
    train_images: InstanceImages
    val_images: InstanceImages

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class; the first one has the label 1."""
        return self.train_images.source.class_names


def build_instance_loaders(
    config: TrainConfig, device: torch.device, rank: int = 0, world_size: int = 1
) -> InstanceLoaders:
    """Open both splits and make the loaders over them.

    Args:
        config: The settings of the run.
        device: Device of the model.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        ValueError: The data set cannot be used, the splits have different classes, or there are too few images.
        ModuleNotFoundError: The data set needs a package that is not installed.
    """
    train, val = (open_instances(config, split) for split in (config.data.train_split, config.data.val_split))
    if train.class_names != val.class_names:
        raise ValueError(
            f"data.path {config.data.path!r} must have the same categories in both splits, got "
            f"{len(train.class_names)} in {config.data.train_split!r} and {len(val.class_names)} in "
            f"{config.data.val_split!r}"
        )
    wanted = config.model.num_classes
    if wanted is not None and wanted != len(train.class_names):
        raise ValueError(
            f"model.num_classes must be null or the number of classes in data.dataset {config.data.dataset!r}, "
            f"{len(train.class_names)}, got {wanted}"
        )
    preprocessing = Preprocessing.from_config(config)
    augment = InstanceTransform(
        config.model.image_shape,
        jitter=config.detection.jitter,
        hflip=config.augment.hflip,
        fill=[round(255 * mean) for mean in preprocessing.mean],
        masks=config.detection.masks,
    )
    mode, bits, seed = preprocessing.color_mode, config.data.bits, config.seed
    train_images = InstanceImages(train, mode, bits=bits, seed=seed, augment=augment)
    val_images = InstanceImages(val, mode, bits=bits)
    order = TrainOrder(
        len(train),
        config.batch_size,
        config.split_batch(world_size).micro_batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )
    return InstanceLoaders(
        train=open_loader(train_images, order, config, device),
        val=build_eval_instance_loader(val, config, device, rank, world_size),
        order=order,
        train_images=train_images,
        val_images=val_images,
    )


def build_eval_instance_loader(
    source: InstanceSource, config: TrainConfig, device: torch.device, rank: int = 0, world_size: int = 1
) -> "DataLoader[Any]":
    """Make a loader over the images of a process, each once and as it is."""
    images = InstanceImages(source, Preprocessing.from_config(config).color_mode, bits=config.data.bits)
    size = config.eval_batch_size or config.micro_batch_size
    order = EvalOrder(len(images), size, rank=rank, world_size=world_size)
    return open_loader(images, order, config, device)


def open_instances(config: TrainConfig, split: str) -> InstanceSource:
    """Open a split of the data set that the settings name.

    Raises:
        ValueError: The data set is not one with objects, or its files cannot be used.
    """
    data = config.data
    if data.dataset == "coco":
        return CocoSource(Path(data.path or "").expanduser(), split)
    if data.dataset == "digit_scenes":
        training = split == data.train_split
        count = config.detection.scenes if training else max(1, config.detection.scenes // _HELD_OUT_SHARE)
        scenes = DigitScenes("train" if training else "val", min(config.model.image_shape), count, _SCENES_SEED)
        return DigitInstances(scenes)
    raise ValueError(f"data.dataset must be 'coco' or 'digit_scenes' for task 'detection', got {data.dataset!r}")
