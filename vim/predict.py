"""`python -m vim.predict`: classify an image, or every image below a folder."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vim.inference.image_command import make_parser, run_on_images

if TYPE_CHECKING:
    from vim.inference.predictor import Prediction, Predictor

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
    options = make_parser("vim.predict", "RUN_OR_CHECKPOINT", _DESCRIPTION).parse_args(argv)

    def predict(predictor: "Predictor", files: Sequence[Path]) -> Iterator[str | None]:
        for prediction in predictor.predict_files(files, options.topk):
            if prediction.error is None:
                _show(prediction)
            yield prediction.error

    return run_on_images("vim.predict", options, predict)


def _show(prediction: "Prediction") -> None:
    width = max(len(name) for name, _ in prediction.guesses)
    lines = [f"  {name:<{width}}  {100 * probability:6.2f} %" for name, probability in prediction.guesses]
    sys.stdout.write("\n".join([str(prediction.path), *lines]) + "\n")


if __name__ == "__main__":
    from vim.runtime.terminal import end_with_reader

    end_with_reader()
    sys.exit(main())
