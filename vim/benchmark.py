"""`python -m vim.benchmark`: our models beside any of timm's, interleaved in one process."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and measure.

    Args:
        argv: The arguments, without the name of the program; `None` takes those of the process.

    Returns:
        The exit code: 0, or 2 when what was asked for cannot be done.
    """
    try:
        from jsonargparse import CLI
    except ImportError:
        return _fail('it needs the "train" extra: pip install "vimamba[train]"')
    from vim.benchmarking.models import run_benchmark

    try:
        arguments = None if argv is None else list(argv)
        CLI(run_benchmark, args=arguments, as_positional=False, prog="python -m vim.benchmark")
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        return _fail(str(error))
    return 0


def _fail(message: str) -> int:
    sys.stderr.write(f"vim.benchmark: {message}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
