"""Data sets of torchvision and Hugging Face, opened by timm; downloads must be asked for."""

import contextlib
import importlib.util
import pickle
from collections.abc import Iterator
from typing import Any

from timm.data import create_dataset

from vim.config.schema import DataConfig
from vim.data.image_files import ImageSource, ReaderSource, TorchvisionSource

_STREAMS = ("hfids", "tfds")
# The exceptions of torchvision, timm and datasets for a data set that is missing, damaged or lacks the split.
_CANNOT_OPEN = (RuntimeError, AssertionError, OSError, TypeError, ValueError, EOFError, pickle.UnpicklingError)


def open_named(data: DataConfig, split: str) -> tuple[ImageSource, tuple[str, ...] | None]:
    """Open a split of `torch/NAME` or `hfds/NAME`.

    Args:
        data: The settings of the data.
        split: The split.

    Returns:
        The images, and the names of their classes in the order of their labels, or `None` without names.

    Raises:
        ValueError: The data set is unknown, not on this machine, damaged or a stream, or it lacks the split.
        ModuleNotFoundError: It needs a package that is not installed.
    """
    name = data.dataset
    kind = name.partition("/")[0].lower()
    if kind in _STREAMS:
        raise ValueError(
            f"data.dataset must allow random access, and {name!r} is a stream: use hfds/NAME, or wds/ for shards on a "
            "disk"
        )
    if kind == "hfds":
        return _open_hugging_face(data, split)
    with _errors_name(data):
        dataset: Any = create_dataset(name, root=data.path, split=split, download=data.download)
    names = getattr(dataset, "classes", None) or getattr(dataset, "all_categories", None)
    title = f"{name} {split}"
    return TorchvisionSource(dataset, title), None if names is None else tuple(map(str, names))


def _open_hugging_face(data: DataConfig, split: str) -> tuple[ImageSource, tuple[str, ...] | None]:
    if importlib.util.find_spec("datasets") is None:
        raise ModuleNotFoundError(
            f'data.dataset {data.dataset!r} needs the package datasets: pip install "vimamba[data]"', name="datasets"
        )
    with contextlib.nullcontext() if data.download else _offline(), _errors_name(data):
        dataset: Any = create_dataset(
            data.dataset, root=data.path, split=split, input_key=data.input_key, target_key=data.target_key
        )
    labels: dict[str, int] = dataset.reader.class_to_idx
    names = tuple(sorted(labels, key=lambda label: labels[label])) or None
    return ReaderSource(dataset.reader, _labels_of(dataset.reader)), names


def _labels_of(reader: Any) -> list[int] | None:
    """Return the column of the labels, or `None` if labels are not numbers in one column."""
    if reader.target_keys or reader.label_key not in reader.dataset.column_names:
        return None
    labels = list(reader.dataset[reader.label_key])
    return labels if all(isinstance(label, int) for label in labels) else None


@contextlib.contextmanager
def _errors_name(data: DataConfig) -> Iterator[None]:
    """Raise errors of the libraries as one `ValueError` that names the data set, its path and the reason."""
    try:
        yield
    except _CANNOT_OPEN as error:
        reason = " ".join(str(error).split())
        hint = "" if data.download else "; to download it, set --data.download true"
        where = f"data.dataset {data.dataset!r} with data.path {data.path!r}"
        raise ValueError(f"{where} cannot be opened: {reason}{hint}") from error


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keep the packages of Hugging Face off the network; they read the environment only when imported."""
    import datasets
    import huggingface_hub

    switches: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    for switch in switches:
        switch.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = value
