"""`python -m vim.convert IN OUT`: extract the weights of a checkpoint, or write them in the original's layout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 2 for arguments that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m vim.convert", description=__doc__, allow_abbrev=False)
    parser.add_argument("source", metavar="IN", help="run folder, or checkpoint of vim.train, the original or timm")
    parser.add_argument("out", metavar="OUT", help="file to write: .safetensors, or .pth for the original's scripts")
    parser.add_argument("--weights", choices=("raw", "ema"), default="raw", help="trained or averaged (default: raw)")
    parser.add_argument("--model", default="", metavar="NAME", help="timm model that the weights must fit")
    options = parser.parse_args(argv)

    from vim.inference.convert import convert

    try:
        convert(options.source, options.out, options.weights, options.model)
    except (ValueError, RuntimeError, OSError) as error:
        sys.stderr.write(f"vim.convert: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    from vim.runtime.command import run_command

    run_command("vim.convert", main, files_matter=True)
