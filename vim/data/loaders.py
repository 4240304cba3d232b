"""Loaders over the two splits: timm's transforms, samplers, collation and prefetching."""

import dataclasses
from collections.abc import Callable
from operator import methodcaller
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, posterize
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms import Compose

from vim.config.schema import TrainConfig
from vim.data.preprocessing import Preprocessing
from vim.data.sources import ImageSets, open_image_sets
from vim.data.tensors import keep_batch


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Loaders:
    """Loaders that yield normalised images (batch, in_chans, height, width) and labels (batch,) on the device."""

    train: PrefetchLoader
    val: PrefetchLoader
    sets: ImageSets

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class, in the order of the labels."""
        return self.sets.class_names

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the training images: a function of the seed and the epoch alone."""
        self.train.sampler.set_epoch(epoch)


def build_loaders(config: TrainConfig, device: torch.device) -> Loaders:
    """Open the data set and make the loaders over it.

    Args:
        config: The settings of the run.
        device: Where the batches go.

    Returns:
        The loaders; the training loader yields whole micro-batches only, the other one every held-out image once.

    Raises:
        ValueError: The data set cannot be used (see `open_image_sets`), or it has fewer training images than one
            optimizer step takes.
        ModuleNotFoundError: The data set needs a package that is not installed.
    """
    sets = open_image_sets(config)
    preprocessing = Preprocessing.from_config(config)
    if not sets.in_memory:
        sets.train.transform = _train_transform(config, preprocessing)
        sets.val.transform = _eval_transform(preprocessing)
    sampler = _train_sampler(sets.train, config)
    shown = len(sampler)
    if shown < config.batch_size:
        raise ValueError(
            f"batch_size must be <= the {shown} training images that an epoch shows, got {config.batch_size}"
        )
    collate = keep_batch if sets.in_memory else fast_collate
    common: dict[str, Any] = {
        "num_workers": config.data.workers,
        "pin_memory": config.data.pin_memory and device.type == "cuda",
        "collate_fn": collate,
    }
    train = DataLoader(sets.train, batch_size=config.micro_batch_size, sampler=sampler, drop_last=True, **common)
    val = DataLoader(sets.val, batch_size=config.eval_batch_size or config.micro_batch_size, **common)
    normalise: dict[str, Any] = {
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "channels": preprocessing.in_chans,
        "device": device,
    }
    augment = config.augment
    return Loaders(
        train=PrefetchLoader(
            train,
            **normalise,
            re_prob=augment.erase_prob,
            re_mode=augment.erase_mode,
            re_count=augment.erase_count,
        ),
        val=PrefetchLoader(val, **normalise),
        sets=sets,
    )


def _train_sampler(dataset: Dataset[Any], config: TrainConfig) -> RepeatAugSampler | DistributedSampler[Any]:
    """Return the order of an epoch. With repeated augmentation it is the original's, for any number of processes.

    timm makes this sampler for several processes only; one process gets it here all the same.
    """
    if config.augment.repeats > 1:
        return RepeatAugSampler(dataset, num_replicas=1, rank=0, num_repeats=config.augment.repeats)
    return DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=True, seed=config.seed)


def _train_transform(config: TrainConfig, preprocessing: Preprocessing) -> Callable[..., Any]:
    """Return timm's training transform, to uint8: the prefetcher normalises and erases on the device."""
    augment = config.augment
    if augment.auto_augment and preprocessing.color_mode == "RGBA":
        raise ValueError(
            f"augment.auto_augment must be null for model.in_chans = {preprocessing.in_chans}, got "
            f"{augment.auto_augment!r}: its operations know grey and colour images only"
        )
    color_jitter: Any = augment.color_jitter
    transform = create_transform(
        preprocessing.input_size,
        is_training=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=color_jitter,
        auto_augment=augment.auto_augment,
        interpolation=augment.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        use_prefetcher=True,
    )
    _allow_posterizing_to_black(transform)
    return Compose([methodcaller("convert", preprocessing.color_mode), transform])


def _allow_posterizing_to_black(transform: Any) -> None:
    """Let timm's policies keep no bit of an image, which they draw now and then, and Pillow 13 refuses."""
    for step in transform.transforms:
        of_policies = [operation for policy in getattr(step, "policy", ()) for operation in policy]
        for operation in [*getattr(step, "ops", ()), *of_policies]:
            if isinstance(operation, AugmentOp) and operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **unused: Any) -> Image.Image:
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return posterize(image, bits_to_keep)


def _eval_transform(preprocessing: Preprocessing) -> Callable[..., Any]:
    transform = create_transform(
        preprocessing.input_size,
        is_training=False,
        interpolation=preprocessing.interpolation,
        crop_pct=preprocessing.crop_pct,
        use_prefetcher=True,
    )
    return Compose([methodcaller("convert", preprocessing.color_mode), transform])
