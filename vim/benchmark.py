"""`python -m vim.benchmark`: compare our models with any models of timm, interleaved in one process.

With `--ops` it compares the scan and the convolution with other implementations, with `--family` the models of other
packages on `vim.compat` with their slow paths and with models of their FLOPs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and measure.

    Args:
        argv: The arguments, without the name of the program; `None` is `sys.argv`.

    Returns:
        The exit code: 0, or 2 for arguments that cannot be used.
    """
    try:
        from jsonargparse import CLI
    except ImportError:
        return _fail('it needs the "train" extra: pip install "vimamba[train]"')
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--ops" in arguments:
        arguments.remove("--ops")
        from vim.benchmarking.options import run_ops_benchmark as run
    elif "--family" in arguments:
        arguments.remove("--family")
        from vim.benchmarking.options import run_family_benchmark as run  # type: ignore[assignment]
    else:
        from vim.benchmarking.options import run_benchmark as run  # type: ignore[assignment]
    try:
        CLI(run, args=arguments, as_positional=False, prog="python -m vim.benchmark")
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        return _fail(str(error))
    return 0


def _fail(message: str) -> int:
    sys.stderr.write(f"vim.benchmark: {message}\n")
    return 2


if __name__ == "__main__":
    from vim.runtime.command import run_command

    run_command("vim.benchmark", main, files_matter=True)
