"""Handling of SIGTERM, which schedulers send before they kill a run, as a request to save and stop."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class RunStopped(RuntimeError):
    """The run was asked to stop and has saved a checkpoint; the message names its step."""


class StopRequest:
    """A request to stop this process; `made` is true once SIGTERM has arrived."""

    def __init__(self) -> None:
        self.made = False

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Handle SIGTERM during the block; outside the main thread, which receives signals, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._take)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.made = True


@contextmanager
def exits_on_sigterm() -> Iterator[None]:
    """Raise SystemExit in the block at SIGTERM, so that half-written files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
