"""`python -m vim`: list the commands."""

import argparse
import sys
from collections.abc import Sequence

from vim.runtime.command import run_command
from vim.version import __version__

COMMANDS = {
    "train": "train a model on labelled images; without arguments, a small Vim on the digits",
    "validate": "evaluate a model on every image of a data set",
    "predict": "classify or segment images, or find their objects",
    "explain": "draw what a model looks at in an image",
    "report": "write a training run as one HTML file",
    "export": "export a model for use without PyTorch",
    "card": "write a run's model as a folder for the Hugging Face hub",
    "convert": "extract the weights of a checkpoint, or write them in the original's layout",
    "benchmark": "compare the speed and memory of models",
    "build": "compile the native kernels before their first use",
    "doctor": "report the machine and the backends of each op",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the list of commands and return 0.

    Args:
        argv: The arguments, without the name of the program; `None` is `sys.argv`.
    """
    lines = [f"  python -m vim.{name:<10} {words}" for name, words in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m vim",
        description="Vision Mamba for timm. The commands, each with --help:\n\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"vimamba {__version__}")
    parser.parse_args(argv)
    sys.stdout.write(f"{parser.description}\n")
    return 0


if __name__ == "__main__":
    run_command("vim", main, files_matter=False)
