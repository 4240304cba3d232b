"""`python -m vim.explain`: draw what a trained model looks at, for an image or for every image of a folder."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vim.explain.names import DEFAULT_DENSE_EXPLANATIONS, DEFAULT_EXPLANATIONS, EXPLANATIONS
from vim.inference.image_command import make_parser, run_on_images
from vim.runtime.terminal import with_progress

if TYPE_CHECKING:
    import torch

    from vim.explain.dense_explainer import DenseExplainer
    from vim.explain.explainer import Explainer
    from vim.inference.trained_model import TrainedModel

_DESCRIPTION = """Draw what a model looks at in an image, or in every image below a folder: one PNG file an image.
Of a segmentation model each class is explained by the pixels that are predicted as the class, and of a detector each
box by its score.

The model comes from a folder that vim.train wrote, from a checkpoint in it, from a checkpoint of somebody else
(with --model), or by name with its published weights."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments, without the name of the program; `None` takes those of the process.

    Returns:
        The exit code: 0 when every image was explained, 1 when some were skipped, 2 when the request cannot be
        fulfilled.
    """
    counted = "classes to name, or of segmentation models and detectors classes or boxes to explain"
    parser = make_parser("vim.explain", "RUN_OR_MODEL", _DESCRIPTION, "explained", "where pictures go", counted)
    parser.add_argument(
        "--method",
        nargs="+",
        metavar="NAME",
        help=f"what to draw, of {', '.join(EXPLANATIONS)}; the last three for classifiers only (default: "
        f"{' '.join(DEFAULT_EXPLANATIONS)}, "
        + ", ".join(f"for {task} {' '.join(names)}" for task, names in DEFAULT_DENSE_EXPLANATIONS.items())
        + ")",
    )
    parser.add_argument(
        "--target",
        metavar="CLASS",
        help="class to explain, by name or number (default: the likeliest; of other models the largest classes, or the "
        "boxes of all classes)",
    )
    options = parser.parse_args(argv)
    root = options.images if options.images.is_dir() else options.images.parent

    def explain(trained: "TrainedModel", device: "torch.device", files: Sequence[Path]) -> Iterator[str | None]:
        explainer = _make_explainer(trained, device, options)
        for file in with_progress(files, "explaining", len(files), shown=len(files) > 1):
            yield _draw(explainer, file, options.output / f"{file.relative_to(root)}.png")

    return run_on_images("vim.explain", options, explain)


def _make_explainer(
    trained: "TrainedModel", device: "torch.device", options: argparse.Namespace
) -> "Explainer | DenseExplainer":
    if trained.task == "classification":
        from vim.explain.explainer import Explainer
        from vim.inference.predictor import make_predictor

        predictor = make_predictor(trained, device)
        return Explainer(predictor, options.method or DEFAULT_EXPLANATIONS, options.target, options.topk)
    from vim.explain.dense_explainer import DenseExplainer

    return DenseExplainer(trained, device, options.method, options.target, options.topk)


def _draw(explainer: "Explainer | DenseExplainer", image: Path, output: Path) -> str | None:
    """Draw an explanation and say where it is, or return the reason why there is none."""
    from vim.data.decoding import read_image
    from vim.explain.checks import NothingToExplainError, using_image

    try:
        with using_image():
            picture = read_image(image)
        (name, share), *_ = explainer.draw(picture, output)
    except NothingToExplainError as error:
        return str(error)
    sys.stdout.write(f"{image}: {name} {100 * share:.2f} % -> {output}\n")
    return None


if __name__ == "__main__":
    from vim.runtime.command import run_command

    run_command("vim.explain", main, files_matter=True)
