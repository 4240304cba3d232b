"""Open the two splits of a data set, by the name in `data.dataset`."""

import dataclasses
from pathlib import Path
from typing import Any, cast

from timm.data import create_dataset
from torch.utils.data import Dataset, IterableDataset

from vim.config.schema import TrainConfig
from vim.data.digits import CLASS_NAMES, load_digits
from vim.data.preprocessing import Preprocessing
from vim.data.synthetic import make_synthetic
from vim.data.tensors import RandomCropFlip, TensorImages

_SYNONYMS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation", "test"),
}
_SYNTHETIC_CLASSES = 10


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ImageSets:
    """The training and the held-out images of a data set, and the names of its classes."""

    train: Any
    val: Any
    class_names: tuple[str, ...]

    @property
    def in_memory(self) -> bool:
        """Whether the images are tensors in memory, and not files to be read."""
        return isinstance(self.train, TensorImages)


def open_image_sets(config: TrainConfig) -> ImageSets:
    """Open the data set that the settings name.

    Args:
        config: The settings of the run.

    Returns:
        The two splits; images that are files come without a transform yet.

    Raises:
        ValueError: The data set is unknown, its folders are missing or empty, or its classes disagree with each other
            or with `model.num_classes`.
        ModuleNotFoundError: The data set needs a package that is not installed.
    """
    name = config.data.dataset
    if name == "digits":
        train, val = load_digits(config.model.image_shape, config.model.in_chans)
        sets = ImageSets(train=train, val=val, class_names=CLASS_NAMES)
    elif name == "synthetic":
        sets = _open_synthetic(config)
    elif name == "folder":
        sets = _open_folders(config)
    else:
        sets = _open_by_timm(config)
    _check_classes(sets, config)
    return _augmented_in_memory(sets, config) if sets.in_memory else sets


def find_split_folder(root: Path, split: str) -> Path:
    """Return the sub-folder of a split, which may go by another usual name (`validation` for `val`).

    Raises:
        ValueError: There is no such folder; the message lists the names that were tried.
    """
    if not root.is_dir():
        raise ValueError(f"data.path must be a folder of images, and {str(root)!r} is not a folder")
    names = next((names for names in _SYNONYMS.values() if split in names), (split,))
    for name in (split, *names):
        if (root / name).is_dir():
            return root / name
    tried = ", ".join(f"{name}/" for name in dict.fromkeys((split, *names)))
    raise ValueError(f"data.path {str(root)!r} must have a folder for the split {split!r}: found none of {tried}")


def _open_synthetic(config: TrainConfig) -> ImageSets:
    num_classes = config.model.num_classes or _SYNTHETIC_CLASSES
    train, val = make_synthetic(
        config.data.synthetic_images, config.model.image_shape, config.model.in_chans, num_classes, config.seed
    )
    return ImageSets(train=train, val=val, class_names=tuple(str(index) for index in range(num_classes)))


def _open_folders(config: TrainConfig) -> ImageSets:
    """Open a folder a split with a folder a class; the training split decides which label a class has."""
    root = Path(cast(str, config.data.path)).expanduser()
    color_mode = Preprocessing.from_config(config).color_mode

    def read(split: str, class_map: dict[str, int] | None = None) -> Any:
        folder = find_split_folder(root, split)
        classes: Any = class_map
        try:
            return create_dataset(
                "", root=str(folder), search_split=False, class_map=classes, input_img_mode=color_mode
            )
        except RuntimeError as error:
            raise ValueError(f"data.path has no images for the split {split!r}: {error}") from error

    train, val = read(config.data.train_split), read(config.data.val_split)
    classes: dict[str, int] = train.reader.class_to_idx
    if len(classes) < 2:
        raise ValueError(
            f"data.path {str(root)!r} must have a folder for each of at least two classes in "
            f"{find_split_folder(root, config.data.train_split).name}/, found {len(classes)}"
        )
    unknown = [name for name in val.reader.class_to_idx if name not in classes]
    if unknown:
        raise ValueError(
            f"data.path {str(root)!r} has a class {unknown[0]!r} in the split {config.data.val_split!r} that the split "
            f"{config.data.train_split!r} lacks"
        )
    if val.reader.class_to_idx != classes:
        val = read(config.data.val_split, class_map=classes)
    return ImageSets(train=train, val=val, class_names=tuple(sorted(classes, key=lambda name: classes[name])))


def _open_by_timm(config: TrainConfig) -> ImageSets:
    """Open a data set of torchvision or Hugging Face through timm."""
    name, data = config.data.dataset, config.data
    if "/" not in name:
        raise ValueError(
            f"data.dataset must be 'digits', 'synthetic', 'folder' or a name with a prefix that timm knows, such as "
            f"'torch/cifar10', got {name!r}"
        )
    color_mode = Preprocessing.from_config(config).color_mode

    def read(split: str) -> Any:
        try:
            return create_dataset(name, root=data.path, split=split, input_img_mode=color_mode)
        except (RuntimeError, AssertionError, OSError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            where = f"data.dataset {name!r} with data.path {data.path!r}"
            raise ValueError(f"{where} cannot be opened: {reason}") from error

    train, val = read(data.train_split), read(data.val_split)
    if isinstance(train, IterableDataset):
        raise ValueError(f"data.dataset must be a set that can be indexed, and {name!r} is read as a stream")
    names = getattr(train, "classes", None)
    if names is None and config.model.num_classes is None:
        raise ValueError(f"model.num_classes must be set: data.dataset {name!r} does not say how many classes it has")
    if names is None:
        names = range(cast(int, config.model.num_classes))
    return ImageSets(train=train, val=val, class_names=tuple(str(label) for label in names))


def _check_classes(sets: ImageSets, config: TrainConfig) -> None:
    wanted = config.model.num_classes
    if wanted is not None and wanted != len(sets.class_names):
        raise ValueError(
            f"model.num_classes must be null or the number of classes in data.dataset {config.data.dataset!r}, "
            f"{len(sets.class_names)}, got {wanted}"
        )


def _augmented_in_memory(sets: ImageSets, config: TrainConfig) -> ImageSets:
    """Give the training images the augmentation that works on a batch in memory, and refuse what does not."""
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
    train = TensorImages(sets.train.images, sets.train.labels, augment=crop)
    return dataclasses.replace(sets, train=train)


def image_files(dataset: Dataset[Any], count: int) -> list[Path]:
    """Return the first files of a data set that is read from files; empty for any other."""
    reader = getattr(dataset, "reader", None)
    if reader is None or not hasattr(reader, "samples"):
        return []
    return [Path(path) for path, _ in reader.samples[:count]]
