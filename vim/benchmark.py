"""`python -m vim.benchmark`: our models beside any of timm's, interleaved in one process."""

from __future__ import annotations

import sys


def main() -> None:
    """Parse the command line and measure."""
    try:
        from jsonargparse import CLI
    except ImportError:
        sys.exit('python -m vim.benchmark needs the "train" extra: pip install "vimamba[train]"')
    from vim.engine.benchmark import run_benchmark

    try:
        CLI(run_benchmark, as_positional=False, prog="python -m vim.benchmark")
    except (ValueError, RuntimeError) as error:
        sys.exit(f"vim.benchmark: {error}")


if __name__ == "__main__":
    main()
