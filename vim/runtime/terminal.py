"""Standard output of the command lines: odd file names and closed pipes."""

import io
import os
import signal
import sys


def show_any_name() -> None:
    """Let standard output escape characters that it cannot encode, such as those of odd file names."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def end_with_reader() -> None:
    """Let the process end silently when its output pipe is closed (`| head`), as other filters do."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def write_out(text: str) -> None:
    """Write to standard output and flush; if its pipe is closed, discard this and later output and go on."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
