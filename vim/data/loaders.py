"""Loaders over the two splits: timm's transforms, erasing, normalisation and prefetching."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, posterize
from timm.data.loader import PrefetchLoader
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vim.config.schema import TrainConfig
from vim.data.image_files import ImageFiles
from vim.data.order import EvalOrder, TrainOrder
from vim.data.preprocessing import Preprocessing
from vim.data.randomness import Draw, seeded
from vim.data.sources import ImageSet, ImageSets, open_image_sets
from vim.data.unreadable import ReadableBatches, UnreadableLog


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Loaders:
    """Loaders that yield normalised images (batch, in_chans, height, width) and labels (batch,) on the device.

    Order and augmentation of the training images are functions of the seed and of the position in the run. Loaders
    neither read nor change the global random generators.
    """

    train: "TrainBatches"
    """The micro-batches of this process, in whole optimizer steps."""
    val: PrefetchLoader
    """The share of this process in the held-out images, each once."""
    sets: ImageSets
    train_unreadable: UnreadableLog
    """Unreadable training images of this process, which were replaced by others."""
    val_unreadable: UnreadableLog
    """Unreadable held-out images of this process, which are missing from `val`."""
    order: TrainOrder
    """Order of the training images."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class, in the order of the labels."""
        return self.sets.class_names

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch of the next iteration over `train`, and the micro-batch it begins with.

        Args:
            epoch: Epochs before this one.
            first_batch: Micro-batches of this process to skip, without reading them.
        """
        self.order.set_epoch(epoch, first_batch)


def build_loaders(config: TrainConfig, device: torch.device, rank: int = 0, world_size: int = 1) -> Loaders:
    """Open the data set and make the loaders over it.

    Args:
        config: The settings of the run.
        device: Device of the batches.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        ValueError: The data set cannot be used (see `open_image_sets`), it has too few training images for one
            optimizer step, or the processes cannot share a step evenly.
        ModuleNotFoundError: The data set needs a package that is not installed.
    """
    sets = open_image_sets(config)
    augment = config.augment
    order = TrainOrder(
        len(sets.train),
        config.batch_size,
        config.split_batch(world_size).micro_batch_size,
        seed=config.seed,
        repeats=augment.repeats,
        rounding=augment.repeats_rounding if augment.repeats > 1 else None,
        rank=rank,
        world_size=world_size,
    )
    if isinstance(sets.train, ImageFiles):
        sets.train.transform = _train_transform(config)
    unreadable = UnreadableLog("replaced by another image")
    train = TrainBatches(prefetch(sets.train, order, config, device, unreadable), order, config, device)
    val, val_unreadable = build_eval_loader(sets.val, config, device, rank, world_size)
    return Loaders(
        train=train, val=val, sets=sets, order=order, train_unreadable=unreadable, val_unreadable=val_unreadable
    )


def build_eval_loader(
    dataset: ImageSet, config: TrainConfig, device: torch.device, rank: int = 0, world_size: int = 1
) -> tuple[PrefetchLoader, UnreadableLog]:
    """Make a loader over the held-out images of a process, each once, and the log of its unreadable images.

    Args:
        dataset: The images.
        config: The settings: the model's input, the data and `eval_batch_size` are used.
        device: Device of the batches.
        rank: Number of this process.
        world_size: Number of processes.
    """
    if isinstance(dataset, ImageFiles):
        dataset.transform = _eval_transform(Preprocessing.from_config(config))
    unreadable = UnreadableLog("left out of the evaluation")
    size = config.eval_batch_size or config.micro_batch_size
    order = EvalOrder(len(dataset), size, rank=rank, world_size=world_size)
    return prefetch(dataset, order, config, device, unreadable), unreadable


def prefetch(
    dataset: Dataset[Any],
    order: TrainOrder | EvalOrder,
    config: TrainConfig,
    device: torch.device,
    unreadable: UnreadableLog,
    collate: Callable[[Any], Any] | None = None,
) -> PrefetchLoader:
    """Return a loader that reads batches in an order, moves them to the device and normalises them there.

    Args:
        dataset: Returns whole batches for lists of `Place`s.
        order: The batches.
        config: The settings of the run.
        device: Device of the batches.
        unreadable: Receives the unreadable images.
        collate: Changes a batch, in the process that read it; `None` leaves it as it is.
    """
    preprocessing = Preprocessing.from_config(config)
    batches: Any = ReadableBatches(open_loader(dataset, order, config, device, collate), unreadable)
    return PrefetchLoader(
        batches,
        mean=preprocessing.mean,
        std=preprocessing.std,
        channels=preprocessing.in_chans,
        device=device,
    )


def open_loader(
    dataset: Dataset[Any],
    order: TrainOrder | EvalOrder,
    config: TrainConfig,
    device: torch.device,
    collate: Callable[[Any], Any] | None = None,
) -> DataLoader[Any]:
    """Return a loader that reads batches in an order, in the workers that the settings ask for."""
    return DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=config.data.workers,
        pin_memory=config.data.pin_memory and device.type == "cuda",
        persistent_workers=config.data.workers > 0,
        collate_fn=collate or _keep_batch,
        generator=torch.Generator(),  # else each iterator draws from the global generator
    )


def _keep_batch(batch: Any) -> Any:
    """Return the batch unchanged: the data sets return whole batches."""
    return batch


class TrainBatches:
    """The training batches of a process, with random rectangles erased.

    Args:
        batches: Yields images and labels on the device, in the order of `order`.
        order: Order of the training images.
        config: The settings of the run.
        device: Device of the batches.
    """

    def __init__(self, batches: PrefetchLoader, order: TrainOrder, config: TrainConfig, device: torch.device) -> None:
        augment = config.augment
        self._batches, self._order, self._seed, self._device = batches, order, config.seed, device
        self._erase = RandomErasing(
            augment.erase_prob, mode=augment.erase_mode, max_count=augment.erase_count, device=device
        )

    def __len__(self) -> int:
        """Return the micro-batches of this process in a whole epoch."""
        return len(self._order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = self._order.epoch
        for batch, (images, labels) in enumerate(self._batches, start=self._order.first_batch):
            if self._erase.probability > 0:
                with seeded(Draw.ERASING, self._seed, epoch, self._order.number(batch), device=self._device):
                    images = self._erase(images)
            yield images, labels


def _train_transform(config: TrainConfig) -> Any:
    """Return timm's training transform, with uint8 output: images are normalised and erased on the device."""
    augment, preprocessing = config.augment, Preprocessing.from_config(config)
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
    return transform


def _allow_posterizing_to_black(transform: Any) -> None:
    """Let timm's policies keep 0 bits of an image, which they draw now and then and which Pillow 13 refuses."""
    for step in transform.transforms:
        of_policies = [operation for policy in getattr(step, "policy", ()) for operation in policy]
        for operation in [*getattr(step, "ops", ()), *of_policies]:
            if isinstance(operation, AugmentOp) and operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **unused: Any) -> Image.Image:
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return posterize(image, bits_to_keep)


def _eval_transform(preprocessing: Preprocessing) -> Any:
    return create_transform(
        preprocessing.input_size,
        is_training=False,
        interpolation=preprocessing.interpolation,
        crop_pct=preprocessing.crop_pct,
        use_prefetcher=True,
    )
