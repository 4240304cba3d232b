"""Data sets of torchvision and of Hugging Face, opened by timm; nothing is downloaded unless it is asked for."""

import contextlib
import importlib.util
import pickle
from collections.abc import Iterator
from typing import Any
from unittest import mock

from timm.data import create_dataset

from vim.config.schema import DataConfig
from vim.data.image_files import ImageSource, ReaderSource, TorchvisionSource

_STREAMS = ("hfids", "tfds")
# What torchvision, timm and datasets raise for a data set that is not there, is damaged or has no such split.
_CANNOT_OPEN = (RuntimeError, AssertionError, OSError, TypeError, ValueError, EOFError, pickle.UnpicklingError)


def open_named(data: DataConfig, split: str) -> tuple[ImageSource, tuple[str, ...] | None]:
    """Open a split of `torch/NAME` or `hfds/NAME`.

    Args:
        data: The settings of the data.
        split: The split.

    Returns:
        The images, and the names of their classes in the order of their labels if the data set tells.

    Raises:
        ValueError: The data set is unknown, not on this machine, damaged, a stream, or has no such split.
        ModuleNotFoundError: It needs a package that is not installed.
    """
    name = data.dataset
    kind = name.partition("/")[0].lower()
    if kind in _STREAMS:
        raise ValueError(
            f"data.dataset must be a set that can be read in any order, and {name!r} is a stream: use hfds/NAME, or "
            "wds/ for shards on a disk"
        )
    if kind == "hfds":
        return _open_hugging_face(data, split)
    with _refused(data):
        dataset: Any = create_dataset(name, root=data.path, split=split, download=data.download)
    names = getattr(dataset, "classes", None) or getattr(dataset, "all_categories", None)
    title = f"{name} {split}"
    return TorchvisionSource(dataset, title), None if names is None else tuple(map(str, names))


def _open_hugging_face(data: DataConfig, split: str) -> tuple[ImageSource, tuple[str, ...] | None]:
    if importlib.util.find_spec("datasets") is None:
        raise ModuleNotFoundError(
            f'data.dataset {data.dataset!r} needs the package datasets: pip install "vimamba[data]"', name="datasets"
        )
    with contextlib.nullcontext() if data.download else _offline(), _refused(data):
        dataset: Any = create_dataset(
            data.dataset, root=data.path, split=split, input_key=data.input_key, target_key=data.target_key
        )
    labels: dict[str, int] = dataset.reader.class_to_idx
    names = tuple(sorted(labels, key=lambda label: labels[label])) or None
    return ReaderSource(dataset.reader, _labels_of(dataset.reader)), names


def _labels_of(reader: Any) -> list[int] | None:
    """Return the column of the labels, or `None` where a label is more than a number in one column."""
    if reader.target_keys or reader.label_key not in reader.dataset.column_names:
        return None
    labels = list(reader.dataset[reader.label_key])
    return labels if all(isinstance(label, int) for label in labels) else None


@contextlib.contextmanager
def _refused(data: DataConfig) -> Iterator[None]:
    """Turn what the libraries raise into one error that names the data set, where it was looked for and why."""
    try:
        yield
    except _CANNOT_OPEN as error:
        reason = " ".join(str(error).split())
        hint = "" if data.download else "; with --data.download true it is fetched, if it can be"
        where = f"data.dataset {data.dataset!r} with data.path {data.path!r}"
        raise ValueError(f"{where} cannot be opened: {reason}{hint}") from error


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keep the packages of Hugging Face from the network: they read their switch when they are imported."""
    import datasets
    import huggingface_hub

    with (
        mock.patch.object(datasets.config, "HF_HUB_OFFLINE", True),
        mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
    ):
        yield
