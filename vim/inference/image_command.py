"""The frame of the command lines that go through images with a trained model: `vim.predict` and `vim.explain`."""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from vim.inference.trained_model import TrainedModel

Work = Callable[["TrainedModel", "torch.device", Sequence[Path]], Iterable[str | None]]
"""Works through files with a model on a device, and yields for each one `None`, or why it is skipped."""


def make_parser(
    program: str, source: str, description: str, output: str, written: str, counted: str = "classes to name"
) -> argparse.ArgumentParser:
    """Return a parser of the arguments that `run_on_images` needs.

    Args:
        program: Name of the module, such as `vim.predict`.
        source: Name of the first argument in the help.
        description: What the command does.
        output: Name of the folder for files, unless the user names another.
        written: What is written there, for the help.
        counted: What `--topk` limits, for the help.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar=source, help="run folder, checkpoint file or timm model")
    parser.add_argument("images", metavar="IMAGE_OR_FOLDER", type=Path, help="image file, or folder of images")
    parser.add_argument("--topk", type=int, default=5, metavar="K", help=f"{counted} (default: 5)")
    parser.add_argument(
        "--weights",
        choices=("best", "raw", "ema"),
        default="best",
        help="raw weights, averaged weights, or the better of both on held-out images (default: best)",
    )
    parser.add_argument("--model", metavar="NAME", help="timm model of a checkpoint that vim.train did not write")
    parser.add_argument(
        "--output", type=Path, default=Path(output), metavar="FOLDER", help=f"{written} (default: {output})"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    return parser


def run_on_images(program: str, options: argparse.Namespace, work: Work) -> int:
    """Load the model, list the images, work through them, and say on standard error which ones are skipped.

    Args:
        program: Name of the module, for messages.
        options: The arguments of a parser that `make_parser` made.
        work: What to do with the images.

    Returns:
        The exit code: 0 if no image was skipped, 1 if some were, 2 for arguments that cannot be used, or 130
        for a run that the user interrupted.
    """
    from vim.data.listing import describe_passed_over
    from vim.inference.predictor import list_images
    from vim.inference.trained_model import load_trained_model
    from vim.runtime.device import resolve_device
    from vim.runtime.terminal import show_any_name

    show_any_name()
    passed_over: Counter[str] = Counter()
    skipped = 0
    try:
        device = resolve_device(options.device)
        trained = load_trained_model(options.source, options.weights, options.model)
        files = list_images(options.images, trained.extensions, passed_over)
        for file, reason in zip(files, work(trained, device, files), strict=True):
            if reason is not None:
                skipped += 1
                sys.stderr.write(f"{program}: {file} is skipped: {reason}\n")
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        sys.stderr.write(f"{program}: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: interrupted\n")
        return 130
    if skipped:
        sys.stderr.write(f"{program}: {skipped} of {len(files)} images were skipped\n")
    if passed_over:
        sys.stderr.write(f"{program}: {describe_passed_over(passed_over)}\n")
    return 1 if skipped else 0
