"""Data sets of torchvision and Hugging Face by name; nothing is downloaded unless the settings ask for it."""

import contextlib
import importlib.util
import pickle
from collections.abc import Iterator
from typing import Any

from timm.data import create_dataset

from vim.config.schema import DataConfig
from vim.data.image_files import ImageSource, ReaderSource, TorchvisionSource

_STREAMS = ("hfids", "tfds")
# torchvision, timm and datasets raise these for a data set that is missing or damaged, or lacks the split.
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
    with refused(data):
        dataset: Any = create_dataset(name, root=data.path, split=split, download=data.download)
    names = getattr(dataset, "classes", None) or getattr(dataset, "all_categories", None)
    title = f"{name} {split}"
    return TorchvisionSource(dataset, title), None if names is None else tuple(map(str, names))


def _open_hugging_face(data: DataConfig, split: str) -> tuple[ImageSource, tuple[str, ...] | None]:
    check_hugging_face(data)
    from vim.data.hugging_face import open_hugging_face

    with refused(data):
        reader = open_hugging_face(data, split)
    return ReaderSource(reader, reader.labels()), reader.class_names()


def check_hugging_face(data: DataConfig) -> None:
    """Raise `ModuleNotFoundError` if the package of Hugging Face's data sets is not installed."""
    if importlib.util.find_spec("datasets") is None:
        raise ModuleNotFoundError(
            f'data.dataset {data.dataset!r} needs the package datasets: pip install "vimamba[data]"', name="datasets"
        )


@contextlib.contextmanager
def refused(data: DataConfig, downloadable: bool = True) -> Iterator[None]:
    """Turn the errors of the libraries into one that names the data set, its path and the reason.

    Args:
        data: The settings of the data.
        downloadable: Mention the setting that downloads the data set.
    """
    try:
        yield
    except _CANNOT_OPEN as error:
        reason = " ".join(str(error).split())
        hint = "; vim.train downloads it with --data.download true" if downloadable and not data.download else ""
        where = f"data.dataset {data.dataset!r} with data.path {data.path!r}"
        raise ValueError(f"{where} cannot be opened: {reason}{hint}") from error
