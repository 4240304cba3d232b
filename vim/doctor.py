"""Report the machine and the backends of each op: `python -m vim.doctor`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report and return 0, also if it reports that something is missing.

    Args:
        argv: The arguments, without the name of the program; `None` is `sys.argv`.
    """
    argparse.ArgumentParser(
        prog="python -m vim.doctor",
        description="Report the versions, the processor, the native kernels, and the backends of each op.",
    ).parse_args(argv)

    from vim.inference.installation import describe_installation

    for title, lines in describe_installation():
        sys.stdout.write(f"{title}\n")
        sys.stdout.writelines(f"  {line}\n" for line in lines)
    return 0


if __name__ == "__main__":
    from vim.runtime.command import run_command

    run_command("vim.doctor", main, files_matter=False)
