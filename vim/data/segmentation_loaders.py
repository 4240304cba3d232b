"""Loaders over pairs of image and mask: normalised crops to train on, whole images to evaluate on."""

import dataclasses
from typing import Any

import torch
from timm.data.loader import PrefetchLoader
from torch.utils.data import DataLoader

from vim.config.schema import TrainConfig
from vim.data.loaders import open_loader, prefetch
from vim.data.order import EvalOrder, TrainOrder
from vim.data.segmentation import PairBatch, PairSet, PairSets, open_pair_sets
from vim.data.unreadable import UnreadableLog


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PairLoaders:
    """The loaders of a run. Order and augmentation are functions of the seed and of the position in the run."""

    train: PrefetchLoader
    """Yields normalised images (batch, in_chans, height, width) and labels (batch, height, width) on the device."""
    val: DataLoader[PairBatch]
    """Yields the share of this process in the held-out pairs, of any size and on the CPU."""
    sets: PairSets
    order: TrainOrder
    """Order of the training pairs."""
    train_unreadable: UnreadableLog
    """Unreadable training pairs of this process, which were replaced by others."""
    val_unreadable: UnreadableLog
    """Unreadable held-out pairs of this process, which are left out."""


def build_pair_loaders(config: TrainConfig, device: torch.device, rank: int = 0, world_size: int = 1) -> PairLoaders:
    """Open the data set and make the loaders over it.

    Args:
        config: The settings of the run.
        device: Device of the training batches.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        ValueError: The data set cannot be used, it has too few images for one optimizer step, or the processes cannot
            share a step evenly.
    """
    sets = open_pair_sets(config)
    micro = config.split_batch(world_size).micro_batch_size
    order = TrainOrder(len(sets.train), config.batch_size, micro, seed=config.seed, rank=rank, world_size=world_size)
    unreadable = UnreadableLog("replaced by another image")
    val, val_unreadable = build_eval_pair_loader(sets.val, config, device, rank, world_size)
    return PairLoaders(
        train=prefetch(sets.train, order, config, device, unreadable, _stack),
        val=val,
        sets=sets,
        order=order,
        train_unreadable=unreadable,
        val_unreadable=val_unreadable,
    )


def build_eval_pair_loader(
    pairs: PairSet, config: TrainConfig, device: torch.device, rank: int = 0, world_size: int = 1
) -> tuple[DataLoader[PairBatch], UnreadableLog]:
    """Make a loader over the held-out pairs of a process, each once, and the log of the unreadable ones."""
    size = config.eval_batch_size or config.micro_batch_size
    order = EvalOrder(len(pairs), size, rank=rank, world_size=world_size)
    return open_loader(pairs, order, config, device), UnreadableLog("left out of the evaluation")


def _stack(batch: PairBatch) -> Any:
    """Return a batch of crops, which have one size, as two tensors and the unreadable pairs."""
    images, masks, unreadable = batch
    return torch.stack(images), torch.stack(masks).long(), unreadable
