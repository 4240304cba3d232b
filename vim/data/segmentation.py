"""The data of segmentation: pairs of image and mask, opened by name and read in batches."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vim.config.schema import TrainConfig
from vim.config.segmentation import MOST_CLASSES
from vim.data import named_pairs, nuclei
from vim.data.decoding import to_color_mode
from vim.data.digit_scenes import DigitScenes
from vim.data.joint_transforms import JointTransform
from vim.data.mask_pairs import MaskPairs, ScenePairs, check_pairs, open_pairs, read_pair
from vim.data.masks import MaskLabels
from vim.data.order import Place
from vim.data.preprocessing import Preprocessing
from vim.data.randomness import Draw, seeded
from vim.data.reading import read_or_replace
from vim.data.unreadable import Unreadable

DATASETS = ("pairs", "ade20k", "voc", "cityscapes", "digit_scenes", "nuclei")
_NAMES = {
    "digit_scenes": ScenePairs.class_names,
    "nuclei": nuclei.CLASS_NAMES,
    "voc": named_pairs.VOC_CLASSES,
    "cityscapes": named_pairs.CITYSCAPES_CLASSES,
}
_BY_NAME = {"voc": named_pairs.open_voc, "cityscapes": named_pairs.open_cityscapes}
_MOST_HELD_OUT = 500  # scenes
_CLASSES_FILE = "classes.txt"
_ADE20K_CLASSES = 150

PairBatch = tuple[list[Tensor], list[Tensor], list[Unreadable]]
"""Images (channels, height, width), masks (height, width), both uint8, and the unreadable pairs."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PairSets:
    """The training and the held-out pairs of a data set, and the names of its classes."""

    train: "PairSet"
    val: "PairSet"
    class_names: tuple[str, ...]


class PairSet(Dataset[PairBatch]):
    """Pairs of image and mask, read a batch at a time; it is indexed with a list of `Place`s.

    Args:
        pairs: The pairs.
        to_labels: Maps the values of a mask to labels.
        color_mode: The mode of PIL that images are converted to.
        bits: Bits in use of a 16-bit grey image.
        seed: Seed of the run, for the augmentation.
        transform: The augmentation; `None` for held-out pairs, which keep their sizes.
        repeats: Times that a pair appears.
    """

    def __init__(
        self,
        pairs: MaskPairs,
        to_labels: Callable[[np.ndarray], np.ndarray],
        color_mode: str,
        *,
        bits: int = 16,
        seed: int = 0,
        transform: JointTransform | None = None,
        repeats: int = 1,
    ) -> None:
        self.pairs, self._to_labels = pairs, to_labels
        self._color_mode, self._bits, self._seed = color_mode, bits, seed
        self._transform, self._repeats = transform, repeats

    def __len__(self) -> int:
        return len(self.pairs) * self._repeats

    def __getitems__(self, places: Sequence[Place]) -> PairBatch:
        """Read a batch; an unreadable pair is replaced by a random one in training, and else left out.

        Raises:
            RuntimeError: Ten pairs in a row, drawn at random, could not be read.
        """
        unreadable: list[Unreadable] = []
        found = [pair for place in places if (pair := self._read_at(place, unreadable)) is not None]
        return [image for image, _ in found], [mask for _, mask in found], unreadable

    def _read_at(self, place: Place, unreadable: list[Unreadable]) -> tuple[Tensor, Tensor] | None:
        pair = read_or_replace(
            place, self.read, self._name, len(self), unreadable, seed=self._seed, replace=self._transform is not None
        )
        if pair is None or self._transform is None:
            return pair
        with seeded(Draw.AUGMENTATION, self._seed, place.epoch, place.position):
            return self._transform(*pair)

    def _name(self, index: int) -> str:
        return self.pairs.name(index % len(self.pairs))

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a pair as it is: image (channels, height, width) and labels (height, width), both uint8.

        Raises:
            BAD_IMAGE: The image or the mask cannot be read, or they do not fit.
        """
        image, labels = read_pair(self.pairs, index % len(self.pairs), self._to_labels)
        pixels = np.atleast_3d(np.asarray(to_color_mode(image, self._color_mode, self._bits)))
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), torch.from_numpy(labels)


def open_pair_sets(config: TrainConfig) -> PairSets:
    """Open the data set that the settings name, and check some pairs of both splits.

    Raises:
        ValueError: The data set is unknown, a folder is missing or empty, or a pair does not fit.
    """
    data = config.data
    train, val = _open(config, data.train_split), _open(config, data.val_split)
    names = _class_names(config)
    to_labels = _mask_labels(config, names)
    for pairs, title in ((train, "training"), (val, "held-out")):
        check_pairs(pairs, to_labels, config.segmentation.checked, title)
    transform, repeats = JointTransform(config), config.segmentation.repeats
    return PairSets(
        train=_pair_set(train, to_labels, config, transform=transform, repeats=repeats),
        val=_pair_set(val, to_labels, config),
        class_names=names,
    )


def open_eval_pairs(config: TrainConfig, split: str, class_names: tuple[str, ...]) -> PairSet:
    """Open one split, to evaluate a model on it.

    Args:
        config: The settings.
        split: The split.
        class_names: Names of the model's classes.

    Raises:
        ValueError: The data set is unknown, its folders are missing or empty, or a pair does not fit.
    """
    pairs = _open(config, split)
    to_labels = _mask_labels(config, class_names)
    check_pairs(pairs, to_labels, config.segmentation.checked, split)
    return _pair_set(pairs, to_labels, config)


def _pair_set(pairs: MaskPairs, to_labels: MaskLabels, config: TrainConfig, **more: Any) -> PairSet:
    mode = Preprocessing.from_config(config).color_mode
    return PairSet(pairs, to_labels, mode, bits=config.data.bits, seed=config.seed, **more)


def _open(config: TrainConfig, split: str) -> MaskPairs:
    data, own = config.data, config.segmentation
    is_train = split == data.train_split
    if data.dataset == "nuclei":
        return nuclei.NucleiPairs(is_train)
    if data.dataset == "digit_scenes":
        height, width = config.model.image_shape
        if height != width:
            raise ValueError(f"model.img_size must be square for data.dataset 'digit_scenes', got {height, width}")
        count = own.scenes if is_train else min(max(1, own.scenes // 4), _MOST_HELD_OUT)
        half = "train" if is_train else "val"
        return ScenePairs(
            DigitScenes(half, height, count, config.seed, own.scene_digits, own.scene_sides, own.scene_overlap)
        )
    if data.dataset in _BY_NAME:
        return _BY_NAME[data.dataset](data, split)
    if data.dataset.lower().startswith("hfds/"):
        return named_pairs.open_hugging_face(data, split)
    if data.dataset not in DATASETS:
        raise ValueError(
            f"data.dataset must be hfds/NAME or one of {', '.join(map(repr, DATASETS))} for task 'segmentation', got "
            f"{data.dataset!r}"
        )
    return open_pairs(cast(str, data.path), split, data.extensions, own.mask_suffix)


def _class_names(config: TrainConfig) -> tuple[str, ...]:
    """Return the names of the classes; they are numbers if nothing names them."""
    names, wanted = _found_names(config), config.model.num_classes
    if names is None:
        if wanted is None:
            raise ValueError(
                "segmentation.classes must name the classes in the order of their values in the masks, such as "
                f"'[background, road]', or {_CLASSES_FILE} in data.path must, a name a line"
            )
        names = tuple(map(str, range(wanted)))
    if wanted is not None and wanted != len(names):
        raise ValueError(f"model.num_classes must be null or the number of classes, {len(names)}, got {wanted}")
    if not 2 <= len(names) <= MOST_CLASSES:
        raise ValueError(f"the data must have 2 to {MOST_CLASSES} classes, got {len(names)}")
    return names


def _found_names(config: TrainConfig) -> tuple[str, ...] | None:
    own, data = config.segmentation, config.data
    if own.classes:
        return own.classes
    if data.dataset in _NAMES:
        return _NAMES[data.dataset]
    file = None if data.path is None else Path(data.path).expanduser() / _CLASSES_FILE
    if file is not None and file.is_file():
        return tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    if data.dataset == "ade20k":
        return tuple(str(value) for value in range(1, _ADE20K_CLASSES + 1))
    return tuple(map(str, own.mask_values)) or None


def _mask_labels(config: TrainConfig, names: Sequence[str]) -> MaskLabels:
    own = config.segmentation
    ignored = () if own.ignore_value is None else (own.ignore_value,)
    if config.data.dataset == "ade20k" and not own.mask_values:  # 0 is everything else
        return MaskLabels(len(names), range(1, len(names) + 1), (0,))
    if config.data.dataset == "cityscapes" and not own.mask_values:
        return MaskLabels(len(names), named_pairs.CITYSCAPES_VALUES, (*named_pairs.CITYSCAPES_VOID, *ignored))
    if own.mask_values and len(own.mask_values) != len(names):
        raise ValueError(
            f"segmentation.mask_values must have a value for each of {len(names)} classes, got {len(own.mask_values)}"
        )
    return MaskLabels(len(names), own.mask_values, ignored)
