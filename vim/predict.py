"""`python -m vim.predict`: classify or segment an image or find its objects, or every image's below a folder."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from vim.inference.object_finder import FoundObjects
    from vim.inference.predictor import Prediction
    from vim.inference.segmenter import Segmentation
    from vim.inference.trained_model import TrainedModel

_DESCRIPTION = """Print the most likely classes of an image, or of every image below a folder, with their probabilities.
A segmentation model writes a mask and an overlay for each image instead, and prints the shares of the classes; a
detector writes a picture and a JSON file, and prints the objects with a score of at least 0.5.

The model is a run folder of vim.train, a checkpoint in it, a checkpoint of another program (with --model), or the
name of a timm model with published weights."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments, without the name of the program; `None` is `sys.argv`.

    Returns:
        The exit code: 0 if every image was read, 1 if some could not be read, or 2 for arguments that cannot be
        used.
    """
    options = _make_parser().parse_args(argv)

    from vim.config.schema import IMAGE_EXTENSIONS
    from vim.data.listing import describe_passed_over
    from vim.inference.predictor import list_images
    from vim.inference.trained_model import load_trained_model
    from vim.runtime.device import resolve_device
    from vim.runtime.terminal import show_any_name

    show_any_name()
    passed_over: Counter[str] = Counter()
    try:
        trained = load_trained_model(options.source, options.weights, options.model)
        extensions = IMAGE_EXTENSIONS if trained.config is None else trained.config.data.extensions
        files = list_images(options.images, extensions, passed_over)
        device = resolve_device(options.device)
        unread = sum(_show(prediction) for prediction in _predict(trained, files, device, options))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"vim.predict: {error}\n")
        return 2
    if unread:
        sys.stderr.write(f"vim.predict: {unread} of {len(files)} images could not be read\n")
    if passed_over:
        sys.stderr.write(f"vim.predict: {describe_passed_over(passed_over)}\n")
    return 1 if unread else 0


def _predict(
    trained: "TrainedModel", files: "Sequence[Path]", device: "torch.device", options: argparse.Namespace
) -> "Iterator[Prediction] | Iterator[Segmentation] | Iterator[FoundObjects]":
    if trained.task == "segmentation":
        return _segment(trained, files, device, options)
    if trained.task == "detection":
        return _detect(trained, files, device, options)
    return _classify(trained, files, device, options)


def _classify(
    trained: "TrainedModel", files: "Sequence[Path]", device: "torch.device", options: argparse.Namespace
) -> "Iterator[Prediction]":
    from vim.inference.predictor import make_predictor

    return make_predictor(trained, device).predict_files(files, options.topk)


def _segment(
    trained: "TrainedModel", files: "Sequence[Path]", device: "torch.device", options: argparse.Namespace
) -> "Iterator[Segmentation]":
    from vim.inference.segmenter import SegmentImages

    return SegmentImages(trained, device).write_files(files, options.output)


def _detect(
    trained: "TrainedModel", files: "Sequence[Path]", device: "torch.device", options: argparse.Namespace
) -> "Iterator[FoundObjects]":
    from vim.inference.object_finder import ObjectFinder

    return ObjectFinder(trained, device).write_files(files, options.output)


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
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("predictions"),
        metavar="FOLDER",
        help="folder for the files of a segmentation model or detector (default: predictions)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    return parser


def _show(prediction: "Prediction | Segmentation | FoundObjects") -> int:
    """Print a prediction; return 1 if the file could not be read, else 0."""
    if prediction.error is not None:
        sys.stderr.write(f"vim.predict: {prediction.path} is skipped: {prediction.error}\n")
        return 1
    from vim.inference.object_finder import FoundObjects
    from vim.inference.segmenter import Segmentation

    if isinstance(prediction, FoundObjects):
        shares, title = prediction.objects, f"{prediction.path} -> {prediction.picture}"
    elif isinstance(prediction, Segmentation):
        shares, title = prediction.shares, f"{prediction.path} -> {prediction.mask}"
    else:
        shares, title = prediction.guesses, str(prediction.path)
    width = max((len(name) for name, _ in shares), default=0)  # an image may have no objects
    lines = [f"  {name:<{width}}  {100 * share:6.2f} %" for name, share in shares]
    sys.stdout.write("\n".join([title, *lines]) + "\n")
    return 0


if __name__ == "__main__":
    from vim.runtime.terminal import end_with_reader

    end_with_reader()
    sys.exit(main())
