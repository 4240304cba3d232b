"""Data sets of Hugging Face, read by the package `datasets`; without `data.download` nothing reaches the network."""

import io
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
import yaml
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub import metadata_load
from PIL import Image

from vim.config.schema import DataConfig
from vim.data.decoding import read_image
from vim.data.masks import read_mask


class HuggingFaceReader:
    """The images of a split as files, each with its label.

    Args:
        dataset: The rows of the split.
        image_key: Column of the images.
        label_key: Column of the labels.

    Raises:
        ValueError: The data set has no such column.
    """

    def __init__(self, dataset: Any, image_key: str, label_key: str) -> None:
        _check_columns(dataset, image_key, label_key)
        self._rows = dataset.cast_column(image_key, datasets.Image(decode=False))
        self._image_key, self._label_key = image_key, label_key

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        row = self._rows[index]
        return _open_file(row[self._image_key]), row[self._label_key]  # the caller closes the file

    def filename(self, index: int, absolute: bool = False) -> str:
        """Return the path that the data set has for an image; it may lie in a cache."""
        return str(self._rows[index][self._image_key]["path"])

    def class_names(self) -> tuple[str, ...] | None:
        """Return the name of each class in the order of the labels, or `None` if the data set has no names."""
        names = getattr(self._rows.features[self._label_key], "names", None)
        return None if names is None else tuple(names)

    def labels(self) -> list[int] | None:
        """Return the label of each image, or `None` if a label is more than a number."""
        labels = list(self._rows[self._label_key])
        return labels if all(isinstance(label, int) for label in labels) else None


class HuggingFacePairs:
    """The images of a split and their masks, which are images too; see `vim.data.mask_pairs.MaskPairs`.

    Args:
        dataset: The rows of the split.
        title: Name of the data set and the split.
        image_key: Column of the images.
        mask_key: Column of the masks.

    Raises:
        ValueError: The data set has no such column.
    """

    def __init__(self, dataset: Any, title: str, image_key: str, mask_key: str) -> None:
        _check_columns(dataset, image_key, mask_key)
        undecoded = datasets.Image(decode=False)
        self._rows = dataset.cast_column(image_key, undecoded).cast_column(mask_key, undecoded)
        self._title, self._image_key, self._mask_key = title, image_key, mask_key
        self.passed_over: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Return an image, upright, and the values of its mask, (height, width), uint8 or uint16."""
        row = self._rows[index]
        with _open_file(row[self._image_key]) as image, _open_file(row[self._mask_key]) as mask:
            return read_image(image), read_mask(mask)

    def name(self, index: int) -> str:
        """Return the name of the data set, with the number of the row."""
        return f"{self._title}[{index}]"

    def keys(self) -> None:
        """Return `None`: the files may be in a cache, under arbitrary names."""


def open_hugging_face(data: DataConfig, split: str) -> HuggingFaceReader:
    """Open a split of `hfds/NAME` as labelled images; see `_open_rows`."""
    return HuggingFaceReader(_open_rows(data, split), data.input_key or "image", data.target_key or "label")


def open_hugging_face_pairs(data: DataConfig, split: str) -> HuggingFacePairs:
    """Open a split of `hfds/NAME` as images and masks; see `_open_rows`."""
    title = f"{data.dataset} {split}"
    return HuggingFacePairs(_open_rows(data, split), title, data.input_key or "image", data.target_key or "annotation")


def _open_rows(data: DataConfig, split: str) -> Any:
    """Open the rows of a split of `hfds/NAME`, where NAME is a folder or a data set of the hub.

    Args:
        data: The settings of the data. With `download` false, a data set of the hub must be in the cache.
        split: The split.

    Raises:
        ValueError: The data set is not on this machine, or has no such split.
    """
    name = data.dataset.partition("/")[2]
    if data.download or Path(name).is_dir():
        if not data.download:
            _check_local(Path(name))
        return datasets.load_dataset(name, split=split, cache_dir=data.path)
    # `load_dataset` asks the hub first; this class is what it falls back to without a network.
    short_name = name.rpartition("/")[2]
    cache = Cache(cache_dir=data.path, dataset_name=short_name, repo_id=name, version="auto", hash="auto")
    return cache.as_dataset(split=split)


def _check_columns(dataset: Any, image_key: str, target_key: str) -> None:
    """Raise `ValueError` if the data set lacks one of the two columns."""
    for setting, key in (("data.input_key", image_key), ("data.target_key", target_key)):
        if key not in dataset.column_names:
            raise ValueError(f"{setting} must be one of its columns, {dataset.column_names}, got {key!r}")


def _open_file(image: Any) -> BinaryIO:
    """Open an image that is not decoded: its bytes, or the file that it names."""
    return io.BytesIO(image["bytes"]) if image["bytes"] else open(image["path"], "rb")


def _check_local(folder: Path) -> None:
    """Raise if the description of the data set in a folder names files on another machine."""
    for name, read in (("README.md", metadata_load), (".huggingface.yaml", _load_yaml)):
        card = folder / name
        try:
            described = read(card) if card.is_file() else None
        except yaml.YAMLError as error:
            raise ValueError(f"{card} is not YAML: {error}") from error
        if isinstance(described, dict) and "://" in str(described.get("configs")):
            raise ValueError(f"{card} names files that are not on this machine")


def _load_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))
