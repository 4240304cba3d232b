"""`python -m vim.predict`: classify an image, or every image below a folder."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vim.inference.predictor import Prediction

_DESCRIPTION = """Print the most likely classes of an image, or of every image below a folder, with their probabilities.

The model is a run folder of vim.train, a checkpoint in it, a checkpoint of another program (with --model), or the
name of a timm model with published weights."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments, without the name of the program; `None` is `sys.argv`.

    Returns:
        The exit code: 0 if every image was classified, 1 if some could not be read, or 2 for arguments that cannot be
        used.
    """
    options = _make_parser().parse_args(argv)

    from vim.data.listing import describe_passed_over
    from vim.inference.predictor import list_images, load_predictor
    from vim.runtime.device import resolve_device
    from vim.runtime.terminal import show_any_name

    show_any_name()
    passed_over: Counter[str] = Counter()
    try:
        predictor = load_predictor(options.source, options.weights, options.model, resolve_device(options.device))
        files = list_images(options.images, predictor.extensions, passed_over)
        predictions = predictor.predict_files(files, options.topk)
        unread = sum(_show(prediction) for prediction in predictions)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"vim.predict: {error}\n")
        return 2
    if unread:
        sys.stderr.write(f"vim.predict: {unread} of {len(files)} images could not be read\n")
    if passed_over:
        sys.stderr.write(f"vim.predict: {describe_passed_over(passed_over)}\n")
    return 1 if unread else 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vim.predict",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="run folder, checkpoint file or timm model")
    parser.add_argument("images", metavar="IMAGE_OR_FOLDER", type=Path, help="image file, or folder of images")
    parser.add_argument("--topk", type=int, default=5, metavar="K", help="classes to name (default: 5)")
    parser.add_argument(
        "--weights",
        choices=("best", "raw", "ema"),
        default="best",
        help="raw weights, averaged weights, or the better of both on held-out images (default: best)",
    )
    parser.add_argument("--model", metavar="NAME", help="timm model of a checkpoint that vim.train did not write")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    return parser


def _show(prediction: "Prediction") -> int:
    """Print a prediction; return 1 if the file could not be read, else 0."""
    if prediction.error is not None:
        sys.stderr.write(f"vim.predict: {prediction.path} is skipped: {prediction.error}\n")
        return 1
    width = max(len(name) for name, _ in prediction.guesses)
    lines = [f"  {name:<{width}}  {100 * probability:6.2f} %" for name, probability in prediction.guesses]
    sys.stdout.write("\n".join([str(prediction.path), *lines]) + "\n")
    return 0


if __name__ == "__main__":
    from vim.runtime.terminal import end_with_reader

    end_with_reader()
    sys.exit(main())
