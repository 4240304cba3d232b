"""Order of the images: a function of the seed, the epoch and the position, for any number of processes."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from vim.data.randomness import Draw, generator_for


class Place(NamedTuple):
    """An image and its position in a run; the augmentation is a function of epoch and position."""

    epoch: int
    position: int
    """Number of images before this one in the epoch, over all processes."""
    image: int
    """Index of the image in the data set."""


class TrainOrder(Sampler[list[Place]]):
    """The micro-batches of one process.

    An epoch has one random order. Each optimizer step takes the next `batch_size` images and deals them out, one by
    one, to `batch_size / micro_batch_size` micro-batches over all processes. The micro-batches are therefore the same
    if one process accumulates them or many share them.

    With repeated augmentation an image appears `repeats` times in a row. Its copies are in one step or in two
    consecutive ones, and in different micro-batches if a step has enough of them. The length of an epoch does not
    change, so it has fewer distinct images. (Hoffer et al. 2020, arXiv:1901.09335. The sampler of DeiT, which the
    original uses, makes the same micro-batches.)

    Args:
        num_images: Images in the training set.
        batch_size: Images in one optimizer step on all processes.
        micro_batch_size: Images in one forward pass of one process.
        seed: Seed of the run.
        repeats: Number of times that an image appears in an epoch; 0 and 1 are the same.
        rounding: Truncate an epoch to a multiple of this, if there are that many images; `None` does not.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        ValueError: An epoch is shorter than one step, or the processes cannot share a step evenly.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        micro_batch_size: int,
        *,
        seed: int = 0,
        repeats: int = 0,
        rounding: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size % (micro_batch_size * world_size):
            raise ValueError(
                f"batch_size must be a multiple of micro_batch_size = {micro_batch_size} times the number of "
                f"processes, {world_size}, got {batch_size}"
            )
        self._num_images, self._batch_size, self._seed = num_images, batch_size, seed
        self._repeats = max(1, repeats)
        self._rank, self._world_size = rank, world_size
        self._micro_batches = batch_size // micro_batch_size  # of a step, on all processes
        self._accumulation = self._micro_batches // world_size
        shown = num_images - (num_images % rounding if rounding and num_images >= rounding else 0)
        self.steps = shown // batch_size
        """Optimizer steps in an epoch; images after the last whole step are not used in it."""
        if self.steps == 0:
            raise ValueError(f"batch_size must be <= the {shown} training images that an epoch shows, got {batch_size}")
        self.epoch = 0
        self._first_batch = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch of the next iteration, and the micro-batch it begins with.

        Args:
            epoch: Epochs before this one.
            first_batch: Micro-batches of this process to skip.
        """
        self.epoch, self._first_batch = epoch, first_batch

    @property
    def first_batch(self) -> int:
        """Micro-batch of this process that the next iteration begins with."""
        return self._first_batch

    def __len__(self) -> int:
        """Return the micro-batches of this process in a whole epoch."""
        return self.steps * self._accumulation

    def __iter__(self) -> Iterator[list[Place]]:
        epoch, order = self.epoch, self._order()
        for batch in range(self._first_batch, len(self)):
            step, offset = divmod(self.number(batch), self._micro_batches)
            start = step * self._batch_size
            positions = range(start + offset, start + self._batch_size, self._micro_batches)
            indices = order[positions.start : positions.stop : positions.step].tolist()
            yield [Place(epoch, *place) for place in zip(positions, indices, strict=True)]

    def number(self, batch: int) -> int:
        """Return the global number in the epoch of a micro-batch of this process."""
        step, turn = divmod(batch, self._accumulation)
        return step * self._micro_batches + turn * self._world_size + self._rank

    def _order(self) -> Tensor:
        """Return the index of the image at each position of the epoch."""
        distinct = -(-self.steps * self._batch_size // self._repeats)
        order = torch.randperm(self._num_images, generator=generator_for(Draw.ORDER, self._seed, self.epoch))
        return order[:distinct].repeat_interleave(self._repeats)


class EvalOrder(Sampler[list[Place]]):
    """Batches of held-out images, each image once: process `rank` reads every `world_size`-th, without padding.

    Args:
        num_images: Images in the held-out set.
        batch_size: Images in one forward pass of one process.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(self, num_images: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        self._indices = range(rank, num_images, world_size)
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._indices) // self._batch_size)

    def __iter__(self) -> Iterator[list[Place]]:
        for start in range(0, len(self._indices), self._batch_size):
            yield [Place(0, index, index) for index in self._indices[start : start + self._batch_size]]
