"""The record of a run's images, which shows on resuming how they changed, and their description at the start."""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from vim.checkpoints.io import atomic_writer
from vim.config.schema import TrainConfig
from vim.data.contents import SplitContents
from vim.data.listing import describe_passed_over, printable

_SHOWN = 5  # classes


def describe_data(
    config: TrainConfig, contents: Mapping[str, SplitContents], images: str, passed_over: Counter[str]
) -> list[str]:
    """Return lines about the data: number of images, skipped files, and the first classes.

    Args:
        config: The settings of the run.
        contents: The images of both splits.
        images: What the images are called, such as `images with masks`.
        passed_over: Number of other files, by kind.
    """
    where = f" in {config.data.path}" if config.data.path else ""
    others = describe_passed_over(passed_over)
    training, held_out = contents["training"], contents["held-out"]
    names, counts = training.class_names, training.class_counts()
    first = [name if counts is None else f"{name} ({counts[label]:,})" for label, name in enumerate(names[:_SHOWN])]
    more = [f"and {len(names) - _SHOWN:,} more"] if len(names) > _SHOWN else []
    return [
        printable(
            f"data     {config.data.dataset}{where}: {training.count:,} training {images}, {held_out.count:,} held "
            f"out, {len(names)} classes{f', {others}' if others else ''}"
        ),
        printable(f"classes  {', '.join(first + more)}"),
    ]


def write_record(path: Path, contents: Mapping[str, SplitContents]) -> None:
    """Write the contents of the splits into a gzipped JSON file."""
    text = json.dumps({split: found.to_dict() for split, found in contents.items()})
    with atomic_writer(path) as file:
        file.write(gzip.compress(text.encode("ascii"), compresslevel=1, mtime=0))


def changes_since_record(path: Path, contents: Mapping[str, SplitContents]) -> list[str]:
    """Return lines on how the images differ from the record in a file.

    Raises:
        ValueError: The file is damaged.
    """
    if not path.exists():
        return [f"images   the run has no {path.name}, so it is unknown whether its images are the same"]
    try:
        record = json.loads(gzip.decompress(path.read_bytes()))
        before = {split: SplitContents.from_dict(data) for split, data in record.items()}
        lines = [
            f"images   the {split} images are not what they were: {change}"
            for split, found in contents.items()
            for change in found.changes_since(before[split])
        ]
    except (OSError, EOFError, zlib.error, RecursionError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged: {error}; remove it to carry on without knowing whether the images are the same"
        ) from error
    return lines
