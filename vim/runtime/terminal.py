"""The terminal of the command lines: odd file names, closed pipes and progress."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_T = TypeVar("_T")
_PLAIN_INTERVAL = 30.0  # seconds between two lines of progress, where there is no terminal


def show_any_name() -> None:
    """Let standard output escape characters that it cannot encode, for example in file names."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def end_with_reader() -> None:
    """Let the process end silently when its output pipe is closed (`| head`), as other filters do."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


class _LastingFile(io.FileIO):
    """The file under a standard stream: what is written after its reader has gone is dropped."""

    def write(self, data: ReadableBuffer, /) -> int:
        """Write to the file, or to nowhere from the first time on that nobody reads it any more."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # of a pipe, and of a terminal that was closed
                raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        return memoryview(data).nbytes


def outlive_reader() -> None:
    """Let the process go on when nobody reads its output any more (`| head`, a closed terminal): its files matter."""
    if os.name == "nt":
        return
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python starts; `end_with_reader` sets it otherwise
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        stream.flush()
        file = io.BufferedWriter(_LastingFile(stream.fileno(), "w", closefd=False))
        lasting = io.TextIOWrapper(file, stream.encoding, stream.errors, None, stream.line_buffering)
        setattr(sys, name, lasting)


def write_out(text: str) -> None:
    """Write to standard output and flush; if its pipe is closed, discard this and later output and go on."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def with_progress(items: Iterable[_T], words: str, total: int, shown: bool = True) -> Iterator[_T]:
    """Yield the items, and show progress on standard error: a bar on a terminal, plain lines elsewhere.

    Args:
        items: What to go through.
        words: What is done with them, such as `evaluating`.
        total: Number of items.
        shown: False shows nothing.
    """
    if not shown:
        yield from items
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if console.is_terminal:
        # Rich would send standard output to the bar's console, and so to standard error, even out of a pipe.
        shares = sys.stdout.isatty()
        with Progress(console=console, transient=True, redirect_stdout=shares) as progress:
            yield from progress.track(items, total, description=words)
        return
    last = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - last > _PLAIN_INTERVAL:
            last = time.monotonic()
            sys.stderr.write(f"{words}: {100 * done / total:.0f} %\n")
        yield item
