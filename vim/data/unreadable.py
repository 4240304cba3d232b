"""Images that cannot be read: named in the log, counted, and never the end of a run by themselves."""

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import DataLoader

_logger = logging.getLogger(__name__)


class Unreadable(NamedTuple):
    """An image that could not be read."""

    name: str
    reason: str


Batch = tuple[Tensor, Tensor, list[Unreadable]]
"""Images (batch, channels, height, width) between 0 and 255, labels (batch,), and what could not be read for it."""


class UnreadableLog:
    """Counts the images that could not be read, and names each once in the log.

    Args:
        consequence: What becomes of such an image, in words.
    """

    def __init__(self, consequence: str) -> None:
        self.reasons: dict[str, str] = {}
        """Why, by the name of the image; those of the whole run."""
        self._consequence = consequence
        self._count = 0

    def add(self, found: list[Unreadable]) -> None:
        """Count these images, and name those that are new."""
        self._count += len(found)
        for name, reason in found:
            if name not in self.reasons:
                self.reasons[name] = reason
                _logger.warning("%s cannot be read and is %s: %s", name, self._consequence, reason)

    def take(self) -> int:
        """Return how often an image could not be read since the last call."""
        count, self._count = self._count, 0
        return count


class ReadableBatches:
    """The batches of a loader as (images, labels), with what could not be read written down.

    Args:
        loader: Yields `Batch`.
        log: Where to write it down.
    """

    def __init__(self, loader: "DataLoader[Any]", log: UnreadableLog) -> None:
        self._loader, self._log = loader, log
        self.dataset, self.batch_sampler = loader.dataset, loader.batch_sampler

    def __len__(self) -> int:
        """Batches that the loader has, with those of which nothing can be read."""
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels, unreadable in self._loader:
            self._log.add(unreadable)
            if len(labels):
                yield images, labels
