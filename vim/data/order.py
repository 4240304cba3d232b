"""Which images are in which batch: a function of the seed, the epoch and the position, on any number of processes."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from vim.data.randomness import Draw, generator_for


class Place(NamedTuple):
    """An image at its place in a run; its augmentation is a function of the first two."""

    epoch: int
    position: int
    """Number of images that the epoch shows before this one, on all processes."""
    image: int
    """Which image of the data set it is."""


class TrainOrder(Sampler[list[Place]]):
    """The micro-batches of one process.

    An epoch shows the images in one random order. Each optimizer step takes the next `batch_size` of them and deals
    them out like cards to its micro-batches, of which there are `batch_size / micro_batch_size` on all processes
    together. The micro-batches are therefore the same whether one process accumulates them or many share them.

    With repeated augmentation an image is shown `repeats` times in a row, so that its copies are in one step, or in two
    that follow each other, and in different micro-batches if a step has as many; an epoch shows as many images as
    without, of fewer. (Hoffer et al. 2020, arXiv:1901.09335; the sampler of DeiT, which the original uses, gives the
    same micro-batches to its GPUs.)

    Args:
        num_images: Images in the training set.
        batch_size: Images in one optimizer step on all processes.
        micro_batch_size: Images in one forward pass of one process.
        seed: Seed of the run.
        repeats: How often an image is shown in an epoch; 0 and 1 are the same.
        rounding: Cut what an epoch shows to a multiple of this, if there are as many images; `None` does not.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        ValueError: An epoch has no whole step, or a step cannot be shared evenly.
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
        self._hands = batch_size // micro_batch_size
        self._accumulation = self._hands // world_size
        shown = num_images - (num_images % rounding if rounding and num_images >= rounding else 0)
        self.steps = shown // batch_size
        """Optimizer steps in an epoch; images beyond the last whole one wait for another epoch's order."""
        if self.steps == 0:
            raise ValueError(f"batch_size must be <= the {shown} training images that an epoch shows, got {batch_size}")
        self.epoch = 0
        self._first_batch = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch, and where in it the next iteration begins.

        Args:
            epoch: Epochs before this one.
            first_batch: Micro-batches of this process that were seen before and are left out.
        """
        self.epoch, self._first_batch = epoch, first_batch

    @property
    def first_batch(self) -> int:
        """Where the next iteration begins."""
        return self._first_batch

    def __len__(self) -> int:
        """Micro-batches of this process in a whole epoch."""
        return self.steps * self._accumulation

    def __iter__(self) -> Iterator[list[Place]]:
        epoch, order = self.epoch, self._order()
        for batch in range(self._first_batch, len(self)):
            start = self.number(batch) // self._hands * self._batch_size
            hand = self.number(batch) % self._hands
            positions = range(start + hand, start + self._batch_size, self._hands)
            indices = order[positions.start : positions.stop : positions.step].tolist()
            yield [Place(epoch, *place) for place in zip(positions, indices, strict=True)]

    def number(self, batch: int) -> int:
        """Return the number of a micro-batch of this process among those of all processes in the epoch."""
        step, turn = divmod(batch, self._accumulation)
        return step * self._hands + turn * self._world_size + self._rank

    def _order(self) -> Tensor:
        """Return the index of the image at each position of the epoch."""
        distinct = -(-self.steps * self._batch_size // self._repeats)
        order = torch.randperm(self._num_images, generator=generator_for(Draw.ORDER, self._seed, self.epoch))
        return order[:distinct].repeat_interleave(self._repeats)


class EvalOrder(Sampler[list[Place]]):
    """Every held-out image once: process `rank` reads every `world_size`-th, and nothing is padded.

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
