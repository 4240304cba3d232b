"""Data sets of Hugging Face, read by the package `datasets`; without `data.download` nothing reaches the network."""

import io
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import yaml
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub import metadata_load

from vim.config.schema import DataConfig


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
        for setting, key in (("data.input_key", image_key), ("data.target_key", label_key)):
            if key not in dataset.column_names:
                raise ValueError(f"{setting} must be one of its columns, {dataset.column_names}, got {key!r}")
        self._rows = dataset.cast_column(image_key, datasets.Image(decode=False))
        self._image_key, self._label_key = image_key, label_key

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        row = self._rows[index]
        image = row[self._image_key]
        if image["bytes"]:
            return io.BytesIO(image["bytes"]), row[self._label_key]
        return open(image["path"], "rb"), row[self._label_key]  # the caller closes it

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


def open_hugging_face(data: DataConfig, split: str) -> HuggingFaceReader:
    """Open a split of `hfds/NAME`, where NAME is a folder or a data set of the hub.

    Args:
        data: The settings of the data. With `download` false, a data set of the hub must be in the cache.
        split: The split.

    Raises:
        ValueError: The data set is not on this machine, or has no such split or column.
    """
    name = data.dataset.partition("/")[2]
    if data.download or Path(name).is_dir():
        if not data.download:
            _check_local(Path(name))
        dataset = datasets.load_dataset(name, split=split, cache_dir=data.path)
    else:
        # `load_dataset` asks the hub first; this class is what it falls back to without a network.
        short_name = name.rpartition("/")[2]
        cache = Cache(cache_dir=data.path, dataset_name=short_name, repo_id=name, version="auto", hash="auto")
        dataset = cache.as_dataset(split=split)
    return HuggingFaceReader(dataset, data.input_key or "image", data.target_key or "label")


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
