"""`python -m vim.card RUN`: a run's model as a folder for the Hugging Face hub, with a model card."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

_DESCRIPTION = """Write a folder that timm ("local-dir:", "hf-hub:") and transformers load a run's classifier from.

It has the weights (model.safetensors), the settings (config.json) and a model card (README.md) with the recipe, the
data, the held-out figures, and how to load the model. Nothing is uploaded."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments, without the name of the program; `None` takes those of the process.

    Returns:
        The exit code: 0, or 2 when there is no such run or the folder cannot be written.
    """
    options = _make_parser().parse_args(argv)

    from vim.runtime.terminal import write_out
    from vim.training.model_card import write_model_card

    try:
        folder = write_model_card(options.run, options.output, options.license)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"vim.card: {error}\n")
        return 2
    write_out(f"{folder}\n")
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vim.card",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that vim.train wrote")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder to write (default: hub in the run)")
    parser.add_argument("--license", default="", metavar="NAME", help="license of the weights, such as apache-2.0")
    return parser


if __name__ == "__main__":
    from vim.runtime.command import run_command

    run_command("vim.card", main, files_matter=True)
