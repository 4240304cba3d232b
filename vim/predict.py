"""`python -m vim.predict`: classify or segment an image or find its objects, or every image's below a folder."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vim.inference.image_command import make_parser, run_on_images

if TYPE_CHECKING:
    import torch

    from vim.inference.trained_model import TrainedModel

_DESCRIPTION = """Print the most likely classes of an image, or of every image below a folder, with their probabilities.
A segmentation model writes a mask and an overlay for each image instead, and prints the shares of the classes; a
detector writes a picture and a JSON file, and prints the objects with a score of at least 0.5.

The model is a run folder of vim.train, a checkpoint in it, a checkpoint of another program (with --model), or the
name of a timm model with published weights."""


def main(argv: Sequence[str] | None = None, before_files: Callable[[], None] = lambda: None) -> int:
    """Run the command line.

    Args:
        argv: The arguments, without the name of the program; `None` is `sys.argv`.
        before_files: Called before a segmentation model or detector writes its first file.

    Returns:
        The exit code: 0 if every image was read, 1 if some could not be read, or 2 for arguments that cannot be
        used.
    """
    written = "folder for the files of a segmentation model or detector"
    options = make_parser("vim.predict", "RUN_OR_CHECKPOINT", _DESCRIPTION, "predictions", written).parse_args(argv)

    def predict(trained: "TrainedModel", device: "torch.device", files: Sequence[Path]) -> Iterator[str | None]:
        run = {"segmentation": _segment, "detection": _detect}.get(trained.task)
        if run is None:
            return _classify(trained, device, files, options.topk)
        before_files()
        return run(trained, device, files, options.output)

    return run_on_images("vim.predict", options, predict)


def _classify(
    trained: "TrainedModel", device: "torch.device", files: Sequence[Path], topk: int
) -> Iterator[str | None]:
    from vim.inference.predictor import make_predictor

    for prediction in make_predictor(trained, device).predict_files(files, topk):
        if prediction.error is None:
            _show(str(prediction.path), prediction.guesses)
        yield prediction.error


def _segment(
    trained: "TrainedModel", device: "torch.device", files: Sequence[Path], output: Path
) -> Iterator[str | None]:
    from vim.inference.segmenter import SegmentImages

    for segmentation in SegmentImages(trained, device).write_files(files, output):
        if segmentation.error is None:
            _show(f"{segmentation.path} -> {segmentation.mask}", segmentation.shares)
        yield segmentation.error


def _detect(
    trained: "TrainedModel", device: "torch.device", files: Sequence[Path], output: Path
) -> Iterator[str | None]:
    from vim.inference.object_finder import ObjectFinder

    for found in ObjectFinder(trained, device).write_files(files, output):
        if found.error is None:
            _show(f"{found.path} -> {found.picture}", found.objects)
        yield found.error


def _show(title: str, shares: Sequence[tuple[str, float]]) -> None:
    """Print names with their probabilities, scores or shares."""
    width = max((len(name) for name, _ in shares), default=0)  # an image may have no objects
    lines = [f"  {name:<{width}}  {100 * share:6.2f} %" for name, share in shares]
    sys.stdout.write("\n".join([title, *lines]) + "\n")


if __name__ == "__main__":
    from functools import partial

    from vim.runtime.command import run_command
    from vim.runtime.terminal import outlive_reader

    # A classifier's lines are all there is, so it ends with their reader; the others go on for their files.
    run_command("vim.predict", partial(main, before_files=outlive_reader), files_matter=False)
