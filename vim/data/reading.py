"""Read one item of a batch; an unreadable one is replaced by another or left out."""

from collections.abc import Callable
from typing import TypeVar

import torch

from vim.data.decoding import BAD_IMAGE, describe_bad_image
from vim.data.order import Place
from vim.data.randomness import Draw, generator_for
from vim.data.unreadable import Unreadable

# So many unreadable images in a row mean that the disk is gone, not that single files are damaged.
_MAX_CONSECUTIVE_FAILURES = 10
_Item = TypeVar("_Item")


def read_or_replace(
    place: Place,
    read: Callable[[int], _Item],
    name: Callable[[int], str],
    count: int,
    unreadable: list[Unreadable],
    *,
    seed: int,
    replace: bool,
) -> _Item | None:
    """Return the item at a place; for an unreadable one a random other, or `None`.

    Args:
        place: The item and its position in the run, which with the seed decides the replacement.
        read: Returns the item with an index.
        name: Returns the name of the item with an index, for messages.
        count: Number of items.
        unreadable: Receives the unreadable items.
        seed: Seed of the run.
        replace: Replace an unreadable item; otherwise leave it out.

    Raises:
        RuntimeError: Ten items in a row, drawn at random, could not be read.
    """
    tried: list[Unreadable] = []
    index, other = place.image, generator_for(Draw.REPLACEMENT, seed, place.epoch, place.position)
    while True:
        try:
            return read(index)
        except BAD_IMAGE as error:
            tried.append(Unreadable(name(index), describe_bad_image(error)))
            unreadable.append(tried[-1])
        if not replace:
            return None
        if len(tried) == _MAX_CONSECUTIVE_FAILURES:
            raise RuntimeError(
                f"{len(tried)} images in a row, drawn at random, could not be read; the last was {tried[-1].name}: "
                f"{tried[-1].reason}"
            )
        index = int(torch.randint(count, (), generator=other))
