"""`python -m vim.export MODEL OUT`: export a model to another runtime, and check it there against PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and export.

    Args:
        argv: The arguments, without the name of the program; `None` is `sys.argv`.

    Returns:
        The exit code: 0, 1 if the export failed, or 2 for arguments that cannot be used.
    """
    try:
        from jsonargparse import CLI
    except ImportError as error:
        return _fail(f'it needs {error.name}: pip install "vimamba[export]"', 2)
    from vim.inference.export import export_model
    from vim.runtime.preemption import exits_on_sigterm

    try:
        with exits_on_sigterm():  # so that partial files are removed
            CLI(export_model, args=None if argv is None else list(argv), prog="python -m vim.export")
    except (ValueError, TypeError, OSError) as error:
        return _fail(str(error), 2)
    except RuntimeError as error:
        return _fail(str(error), 1)
    return 0


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"vim.export: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
