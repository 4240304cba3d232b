"""Segmentation sets by name: Pascal VOC and Cityscapes, listed by torchvision, and sets of Hugging Face."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from torchvision.datasets import Cityscapes, VOCSegmentation

from vim.config.schema import DataConfig
from vim.data.mask_pairs import FilePairs, MaskPairs
from vim.data.named_sets import check_hugging_face, refused

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_VOC_FOLDER = Path("VOCdevkit", "VOC2012")

_EVALUATED = [entry for entry in Cityscapes.classes if not entry.ignore_in_eval]
CITYSCAPES_CLASSES = tuple(entry.name for entry in _EVALUATED)
CITYSCAPES_VALUES = tuple(entry.id for entry in _EVALUATED)
"""Value of each class in the files `*_labelIds.png`."""
CITYSCAPES_VOID = tuple(entry.id for entry in Cityscapes.classes if entry.ignore_in_eval and entry.id >= 0)
"""Values of pixels that the benchmark does not evaluate."""


def open_voc(data: DataConfig, split: str) -> FilePairs:
    """Open `train`, `val` or `trainval` of Pascal VOC 2012, in the folder that holds `VOCdevkit`.

    Raises:
        ValueError: The data set is not there, or has no such split.
    """
    root = _root(data)
    download = data.download and not (root / _VOC_FOLDER).is_dir()  # torchvision would unpack it for every split
    with refused(data):
        found = VOCSegmentation(root, image_set=split, download=download)
    return _file_pairs(root, found.images, found.targets)


def open_cityscapes(data: DataConfig, split: str) -> FilePairs:
    """Open `train` or `val` of Cityscapes, in the folder that holds `leftImg8bit` and `gtFine`.

    Raises:
        ValueError: The data set is not there, it has no such split, or a download was asked for.
    """
    if data.download:
        raise ValueError(
            "data.download must be false for data.dataset 'cityscapes', which needs a registration: fetch "
            "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from cityscapes-dataset.com into data.path"
        )
    root = _root(data)
    with refused(data, downloadable=False):
        found = Cityscapes(root, split=split, mode="fine", target_type="semantic")
    return _file_pairs(root, found.images, [target for (target,) in cast(Any, found.targets)])


def open_hugging_face(data: DataConfig, split: str) -> MaskPairs:
    """Open a split of `hfds/NAME`, with images and masks in the columns that the settings name.

    Raises:
        ValueError: The data set is not on this machine, or has no such split or column.
        ModuleNotFoundError: The package datasets is not installed.
    """
    check_hugging_face(data)
    from vim.data.hugging_face import open_hugging_face_pairs

    with refused(data):
        return open_hugging_face_pairs(data, split)


def _root(data: DataConfig) -> Path:
    return Path(cast(str, data.path)).expanduser()


def _file_pairs(root: Path, images: Sequence[str], masks: Sequence[str]) -> FilePairs:
    """Return pairs of files in the order of their names; torchvision may list them in the order of the disk."""
    relative = ([Path(path).relative_to(root).as_posix() for path in paths] for paths in (images, masks))
    pairs = sorted(zip(*relative, strict=True))
    return FilePairs(root, [image for image, _ in pairs], [mask for _, mask in pairs], Counter())
