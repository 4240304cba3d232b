"""`python -m vim.validate`: evaluate a model on every image of a data set, with any number of processes."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vim.inference.validation import Evaluation, ValidateOptions
    from vim.runtime.distributed import Processes

_DESCRIPTION = """Evaluate a model on every image of a data set, each once: loss, top-1 and top-5 accuracy, a table of
the classes (classes.csv) and a confusion matrix (confusion.csv, confusion.png). Of a segmentation: loss, mean
intersection over union and accuracy of the pixels, the same tables, and pictures (predictions.png). Of a detection:
COCO's average precision of boxes and masks, and pictures.

The model is a run folder of vim.train, a checkpoint in it, a checkpoint of another program (with --model), or the
name of a timm model with published weights. By default a run is evaluated on its own held-out images. With torchrun
the processes share the images:

  torchrun --nproc_per_node 8 -m vim.validate vim_tiny_patch16_224.in1k --path IMAGENET"""
_NEEDED = ("rich", "matplotlib")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments, without the name of the program; `None` is `sys.argv`.

    Returns:
        The exit code: 0 if every image was evaluated, 1 if some could not be read, or 2 for arguments that cannot be
        used.
    """
    arguments = vars(_make_parser().parse_args(argv))
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(f'vim.validate: {", ".join(missing)} is not installed: pip install "vimamba[train]"\n')
        return 2

    from vim.inference.validation import ValidateOptions
    from vim.runtime.distributed import JoinError, join_processes
    from vim.runtime.terminal import show_any_name, write_out

    show_any_name()
    try:
        with join_processes() as processes:
            try:
                validation = _validate(ValidateOptions(**arguments), processes)
                if processes.is_main:
                    _show(validation)  # first, since writing may fail on a full disk
                    validation.write()
                    write_out(f"files: {validation.folder}\n")
            except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
                if processes.is_main:
                    sys.stderr.write(f"vim.validate: {error}\n")
                return 2
    except JoinError as error:
        sys.stderr.write(f"vim.validate: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("vim.validate: interrupted\n")
        return 130
    return 1 if validation.unreadable else 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vim.validate",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="run folder, checkpoint file or timm model")
    parser.add_argument(
        "--weights",
        choices=("best", "raw", "ema"),
        default="best",
        help="raw weights, averaged weights, or the better of both in the run; raw in other files (default: best)",
    )
    parser.add_argument("--model", metavar="NAME", help="timm model of a checkpoint that vim.train did not write")
    parser.add_argument(
        "--dataset", metavar="NAME", help="data set, as data.dataset of vim.train (default: the run's, or folder)"
    )
    parser.add_argument("--path", metavar="FOLDER", help="folder of the images (default: the run's)")
    parser.add_argument("--split", metavar="NAME", help="split to evaluate (default: the held-out images)")
    parser.add_argument("--input-key", metavar="NAME", help="column of the images in a set of Hugging Face")
    parser.add_argument("--target-key", metavar="NAME", help="column of the labels in a set of Hugging Face")
    parser.add_argument("--crop-pct", type=float, metavar="SHARE", help="centre crop (default: the model's)")
    parser.add_argument("--batch-size", type=int, metavar="IMAGES", help="images in one forward pass of a process")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read images, per process")
    parser.add_argument("--precision", choices=("float32", "tf32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="output folder (default: RUN/validation, or validation-NAME)"
    )
    return parser


def _validate(options: "ValidateOptions", processes: "Processes") -> "Evaluation":
    """Load the model, and evaluate it as its task asks."""
    from vim.inference.trained_model import load_trained_model

    trained = processes.together(lambda: load_trained_model(options.source, options.weights, options.model))
    if trained.task == "segmentation":
        from vim.inference.mask_validation import validate_masks

        return validate_masks(options, processes, trained)
    if trained.task == "detection":
        from vim.inference.detection_validation import validate_detections

        return validate_detections(options, processes, trained)
    from vim.inference.validation import validate

    return validate(options, processes, trained)


def _show(validation: "Evaluation") -> None:
    """Print the results, and the number of images missing from them."""
    from vim.data.listing import describe_passed_over
    from vim.runtime.terminal import write_out

    lines = [f"{validation.headline}  on {validation.count:,} images"]
    if validation.unreadable:
        lines.append(f"{validation.unreadable:,} more images could not be read and are missing from these figures")
    if validation.passed_over:
        lines.append(describe_passed_over(validation.passed_over))
    write_out("\n".join(lines) + "\n")


if __name__ == "__main__":
    from vim.runtime.command import run_command

    run_command("vim.validate", main, files_matter=True)
