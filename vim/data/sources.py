"""Open the two splits of a data set, by the name in `data.dataset`."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import cast

from vim.config.schema import TrainConfig
from vim.data import digits, fashion_mnist
from vim.data.decoding import BAD_IMAGE
from vim.data.folders import open_folder
from vim.data.image_files import FileSource, ImageFiles, ImageSource, Relabelled
from vim.data.named_sets import open_named
from vim.data.preprocessing import Preprocessing
from vim.data.shards import open_shards
from vim.data.synthetic import make_synthetic
from vim.data.tensors import RandomCropFlip, TensorImages

ImageSet = TensorImages | ImageFiles
_InMemory = tuple[TensorImages, TensorImages, tuple[str, ...]]

_SYNTHETIC_CLASSES = 10


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ImageSets:
    """The training and the held-out images of a data set, and the names of its classes."""

    train: ImageSet
    val: ImageSet
    class_names: tuple[str, ...]


def open_image_sets(config: TrainConfig) -> ImageSets:
    """Open the data set that the settings name.

    Args:
        config: The settings of the run.

    Returns:
        The two splits; images in files have no transform yet.

    Raises:
        ValueError: The data set is unknown, its folders are missing or empty, or the classes of the splits and
            `model.num_classes` disagree.
        ModuleNotFoundError: The data set needs a package that is not installed.
    """
    if config.data.dataset in _IN_MEMORY:
        train, val, class_names = _IN_MEMORY[config.data.dataset](config)
        _check_classes(class_names, config)
        return ImageSets(train=_augmented(train, config), val=val, class_names=class_names)
    source, names = _open_split(config, config.data.train_split)
    class_names = _class_names(names, config)
    _check_classes(class_names, config)
    held_out, held_out_names = _open_split(config, config.data.val_split, class_names)
    held_out = _relabel(held_out, held_out_names, class_names, config)
    return ImageSets(
        train=_files(source, class_names, config, replace=True),
        val=_files(held_out, class_names, config, replace=False),
        class_names=class_names,
    )


def open_eval_set(
    config: TrainConfig, split: str, class_names: tuple[str, ...] | None
) -> tuple[ImageSet, tuple[str, ...]]:
    """Open one split, to evaluate a model on it.

    Args:
        config: The settings: the data and the model's input are used.
        split: The split.
        class_names: Names of the model's classes, which define the labels; `None` takes the classes of the data.

    Returns:
        The images (in files: without a transform), and the names of the classes.

    Raises:
        ValueError: The data set is unknown, its folders are missing or empty, or it has a class that the model lacks.
        ModuleNotFoundError: The data set needs a package that is not installed.
    """
    if config.data.dataset in _IN_MEMORY:
        train, val, names = _IN_MEMORY[config.data.dataset](config)
        if class_names is not None and class_names != names:
            raise ValueError(
                f"data.dataset {config.data.dataset!r} has the classes {', '.join(names)}, the model has "
                f"{len(class_names)}: {', '.join(class_names[:10])}"
            )
        return train if split == config.data.train_split else val, names
    source, found = _open_split(config, split, class_names or ())
    wanted = _class_names(found, config) if class_names is None else class_names
    return _files(_relabel(source, found, wanted, config), wanted, config, replace=False), wanted


def _digits(config: TrainConfig) -> _InMemory:
    return *digits.load_digits(config.model.image_shape, config.model.in_chans), digits.CLASS_NAMES


def _fashion_mnist(config: TrainConfig) -> _InMemory:
    path = config.data.path
    folder = None if path is None else Path(path).expanduser()
    sets = fashion_mnist.load_fashion_mnist(folder, config.model.image_shape, config.model.in_chans)
    return *sets, fashion_mnist.CLASS_NAMES


def _synthetic(config: TrainConfig) -> _InMemory:
    num_classes = config.model.num_classes or _SYNTHETIC_CLASSES
    sets = make_synthetic(
        config.data.synthetic_images, config.model.image_shape, config.model.in_chans, num_classes, config.seed
    )
    return *sets, tuple(str(index) for index in range(num_classes))


_IN_MEMORY: dict[str, Callable[[TrainConfig], _InMemory]] = {
    "digits": _digits,
    "fashion_mnist": _fashion_mnist,
    "synthetic": _synthetic,
}


def _open_split(
    config: TrainConfig, split: str, known: tuple[str, ...] = ()
) -> tuple[ImageSource, tuple[str, ...] | None]:
    """Return the images of a split, and the names of their classes in the order of their labels, or `None`."""
    data = config.data
    if data.dataset == "folder":
        return open_folder(cast(str, data.path), split, data.extensions, known)
    if "/" not in data.dataset:
        raise ValueError(
            f"data.dataset must be 'folder', one of {', '.join(map(repr, _IN_MEMORY))}, 'wds/', or a name with a "
            f"prefix that timm knows, such as 'torch/cifar10', got {data.dataset!r}"
        )
    if data.dataset.partition("/")[0].lower() == "wds":
        return open_shards(cast(str, data.path), split, data.extensions)
    return open_named(data, split)


def _files(source: ImageSource, class_names: tuple[str, ...], config: TrainConfig, *, replace: bool) -> ImageFiles:
    color_mode = Preprocessing.from_config(config).color_mode
    return ImageFiles(source, len(class_names), color_mode, bits=config.data.bits, seed=config.seed, replace=replace)


def _class_names(names: tuple[str, ...] | None, config: TrainConfig) -> tuple[str, ...]:
    """Return the names of the classes; they are numbers if the data has no names."""
    data, num_classes = config.data, config.model.num_classes
    if names is None and num_classes is None:
        raise ValueError(f"model.num_classes must be set: data.dataset {data.dataset!r} does not name its classes")
    if names is None:
        return tuple(map(str, range(cast(int, num_classes))))
    if len(names) < 2:
        raise ValueError(
            f"data.path {data.path!r} must have at least two classes, one folder each, in the split "
            f"{data.train_split!r}, found {len(names)}: {', '.join(names)}"
        )
    return names


def _relabel(
    source: ImageSource, names: tuple[str, ...] | None, class_names: tuple[str, ...], config: TrainConfig
) -> ImageSource:
    """Return the images with labels that index into `class_names`."""
    if names is None or names == class_names:
        return source
    unknown = [name for name in names if name not in class_names]
    if unknown:
        raise ValueError(
            f"data.path {config.data.path!r} has a class {unknown[0]!r} among its held-out images that the "
            f"{len(class_names)} classes of the model lack: {', '.join(class_names[:5])}, ..."
        )
    return Relabelled(source, [class_names.index(name) for name in names])


def _check_classes(class_names: tuple[str, ...], config: TrainConfig) -> None:
    wanted = config.model.num_classes
    if wanted is not None and wanted != len(class_names):
        raise ValueError(
            f"model.num_classes must be null or the number of classes in data.dataset {config.data.dataset!r}, "
            f"{len(class_names)} ({', '.join(class_names[:5])}{', ...' if len(class_names) > 5 else ''}), got {wanted}"
        )


def _augmented(train: TensorImages, config: TrainConfig) -> TensorImages:
    """Return training images with augmentation in memory; raise for settings that it does not support."""
    augment = config.augment
    for name in ("auto_augment", "color_jitter"):
        value = getattr(augment, name)
        if value:
            raise ValueError(
                f"augment.{name} must be null for data.dataset {config.data.dataset!r}, whose images are augmented in "
                f"memory, got {value!r}"
            )
    crop = RandomCropFlip(
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        vflip=augment.vflip,
        interpolation=augment.interpolation,
    )
    return TensorImages(train.images, train.labels, augment=crop, seed=config.seed)


def first_readable_file(dataset: ImageSet, tries: int = 10) -> Path | None:
    """Return the first readable image file whose name is UTF-8, or `None` if images are not files.

    Args:
        dataset: The images.
        tries: Number of images to try.
    """
    source = dataset.source if isinstance(dataset, ImageFiles) else None
    while isinstance(source, Relabelled):
        source = source.source
    if not isinstance(source, FileSource):
        return None
    for index in range(min(tries, len(source))):
        name = source.name(index)
        try:
            source.read(index)
            name.encode("utf-8")
        except BAD_IMAGE:
            continue
        return Path(name)
    return None
