"""What command lines do about the terminal, file or pipe that they write to."""

import io
import os
import signal
import sys


def show_any_name() -> None:
    """Let the standard output escape what it cannot show: the name of a file need not be text, nor fit the terminal."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def end_with_reader() -> None:
    """Let the process end without a word, as other filters do, when nobody reads its output any more (`| head`)."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def write_out(text: str) -> None:
    """Write to the standard output at once; if nobody reads it any more, there is more to do than to talk."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
