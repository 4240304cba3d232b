"""`python -m vim.explain`: draw what a trained model looks at, for an image or for every image of a folder."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vim.explain.names import DEFAULT_EXPLANATIONS, EXPLANATIONS
from vim.inference.image_command import make_parser, run_on_images
from vim.runtime.terminal import with_progress

if TYPE_CHECKING:
    import torch

    from vim.explain.explainer import Explainer
    from vim.inference.trained_model import TrainedModel

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
    parser = make_parser("vim.explain", "RUN_OR_MODEL", _DESCRIPTION, "explained", "where pictures go")
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
    options = parser.parse_args(argv)
    root = options.images if options.images.is_dir() else options.images.parent

    def explain(trained: "TrainedModel", device: "torch.device", files: Sequence[Path]) -> Iterator[str | None]:
        from vim.explain.explainer import Explainer
        from vim.inference.predictor import make_predictor

        explainer = Explainer(make_predictor(trained, device), options.method, options.target, options.topk)
        for file in with_progress(files, "explaining", len(files), shown=len(files) > 1):
            yield _draw(explainer, file, options.output / f"{file.relative_to(root)}.png")

    return run_on_images("vim.explain", options, explain)


def _draw(explainer: "Explainer", image: Path, output: Path) -> str | None:
    """Draw an explanation and say where it is, or return the reason why the image cannot be read."""
    from vim.data.decoding import BAD_IMAGE, describe_bad_image, read_image

    try:
        picture = read_image(image)
    except BAD_IMAGE as error:
        return describe_bad_image(error)
    (name, share), *_ = explainer.draw(picture, output)
    sys.stdout.write(f"{image}: {name} {100 * share:.2f} % -> {output}\n")
    return None


if __name__ == "__main__":
    from vim.runtime.command import run_command

    run_command("vim.explain", main, files_matter=True)
