"""SIGTERM, which schedulers send before they kill, as a request to save and stop."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class RunStopped(RuntimeError):
    """The run was asked to stop, and has saved where it is; the message says where that is."""


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.made = False

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Take SIGTERM as a request for the time of the block; signals reach the main thread only."""
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
    """Leave the block by SystemExit at SIGTERM, so that whatever removes half-written files runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
