"""`python -m vim.report`: a training run as one HTML file, with curves, classes, and the worst mistakes."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

_DESCRIPTION = """Write a report of a training run: one HTML file that any browser shows without a network.

It has the curves, the classes and what they are taken for, the worst mistakes with the model's attention, the
environment and the settings. The held-out images must still be where they were."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments, without the name of the program; `None` takes those of the process.

    Returns:
        The exit code: 0, or 2 when there is no such run or its images are gone.
    """
    options = _make_parser().parse_args(argv)

    from vim.explain.report import write_report
    from vim.runtime.device import resolve_device
    from vim.runtime.terminal import write_out

    try:
        path = write_report(options.run, options.output, resolve_device(options.device))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.stderr.write(f"vim.report: {error}\n")
        return 2
    write_out(f"{path}\n")
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vim.report",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that vim.train wrote")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the report (default: report.html in the folder)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    return parser


if __name__ == "__main__":
    from vim.runtime.command import run_command

    run_command("vim.report", main, files_matter=True)
