"""Unreadable images: they are counted and logged, and do not stop a run."""

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
"""Images (batch, channels, height, width) between 0 and 255, labels (batch,), and the unreadable images."""


class UnreadableLog:
    """Counter of unreadable images that also logs the name of each image once.

    Args:
        consequence: Words for the log: the image "cannot be read and is ...".
    """

    def __init__(self, consequence: str) -> None:
        self.reasons: dict[str, str] = {}
        """Reason by name of the image, over the whole run."""
        self._consequence = consequence
        self._count = 0

    def add(self, found: list[Unreadable]) -> None:
        """Count these images, and log the new ones."""
        self._count += len(found)
        for name, reason in found:
            if name not in self.reasons:
                self.reasons[name] = reason
                _logger.warning("%s cannot be read and is %s: %s", name, self._consequence, reason)

    def take(self) -> int:
        """Return the number of failed reads since the last call."""
        count, self._count = self._count, 0
        return count


class ReadableBatches:
    """The batches of a loader as (images, labels); unreadable images go to a log.

    Args:
        loader: Yields `Batch`.
        log: Receives the unreadable images.
    """

    def __init__(self, loader: "DataLoader[Any]", log: UnreadableLog) -> None:
        self._loader, self._log = loader, log
        self.dataset, self.batch_sampler = loader.dataset, loader.batch_sampler

    def __len__(self) -> int:
        """Return the number of batches of the loader, including batches without a readable image."""
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels, unreadable in self._loader:
            self._log.add(unreadable)
            if len(labels):
                yield images, labels
