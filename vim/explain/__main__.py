"""`python -m vim.explain`: draw what a trained model looks at, for an image or for every image of a folder."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vim.explain.explainer import DEFAULT_EXPLANATIONS, EXPLANATIONS

if TYPE_CHECKING:
    from vim.explain.explainer import Explainer

_DESCRIPTION = """Draw what a model looks at in an image, or in every image below a folder: one PNG file an image.

The model comes from a folder that vim.train wrote, from a checkpoint in it, from a checkpoint of somebody else
(with --model), or by name with its published weights."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments, without the name of the program; `None` takes those of the process.

    Returns:
        The exit code: 0 when every image was explained, 1 when some could not be read, 2 when the request cannot be
        fulfilled.
    """
    options = _make_parser().parse_args(argv)

    from rich.console import Console
    from rich.progress import track

    from vim.data.listing import describe_passed_over
    from vim.explain.explainer import Explainer
    from vim.inference.predictor import list_images, load_predictor
    from vim.runtime.device import resolve_device
    from vim.runtime.terminal import show_any_name

    show_any_name()
    passed_over: Counter[str] = Counter()
    try:
        predictor = load_predictor(options.source, options.weights, options.model, resolve_device(options.device))
        explainer = Explainer(predictor, options.method, options.target, options.topk)
        files = list_images(options.images, predictor.extensions, passed_over)
        root = options.images if options.images.is_dir() else options.images.parent
        shown = track(files, "explaining", console=Console(stderr=True), transient=True, disable=len(files) == 1)
        unread = sum(_draw(explainer, file, options.output / f"{file.relative_to(root)}.png") for file in shown)
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        sys.stderr.write(f"vim.explain: {error}\n")
        return 2
    if unread:
        sys.stderr.write(f"vim.explain: {unread} of {len(files)} images could not be read\n")
    if passed_over:
        sys.stderr.write(f"vim.explain: {describe_passed_over(passed_over)}\n")
    return 1 if unread else 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vim.explain",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="RUN_OR_MODEL", help="run folder, checkpoint file or timm model")
    parser.add_argument("images", metavar="IMAGE_OR_FOLDER", type=Path, help="image file, or folder of images")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("explained"),
        metavar="FOLDER",
        help="where pictures go (default: explained)",
    )
    parser.add_argument(
        "--method",
        nargs="+",
        default=list(DEFAULT_EXPLANATIONS),
        metavar="NAME",
        help=f"what to draw, of {', '.join(EXPLANATIONS)} (default: {' '.join(DEFAULT_EXPLANATIONS)})",
    )
    parser.add_argument(
        "--target", metavar="CLASS", help="class to explain, by name or number (default: the likeliest)"
    )
    parser.add_argument("--topk", type=int, default=5, metavar="K", help="classes to name (default: 5)")
    parser.add_argument(
        "--weights",
        choices=("best", "raw", "ema"),
        default="best",
        help="the averaged weights, the raw ones, or those that did better on held-out images (default: best)",
    )
    parser.add_argument("--model", metavar="NAME", help="timm model of a checkpoint that vim.train did not write")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    return parser


def _draw(explainer: "Explainer", image: Path, output: Path) -> int:
    """Draw an explanation and say where it is; return 1 if the image cannot be read."""
    from vim.data.decoding import BAD_IMAGE, read_image

    try:
        picture = read_image(image)
    except BAD_IMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(f"vim.explain: {image} is skipped: {reason}\n")
        return 1
    (name, share), *_ = explainer.draw(picture, output)
    sys.stdout.write(f"{image}: {name} {100 * share:.2f} % -> {output}\n")
    return 0


if __name__ == "__main__":
    from vim.runtime.terminal import end_with_reader

    end_with_reader()
    sys.exit(main())
