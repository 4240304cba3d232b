"""Pairs of image and mask: in folders, as scenes of digits, and checked before a run."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from vim.config.schema import IMAGE_EXTENSIONS
from vim.data.decoding import BAD_IMAGE, describe_bad_image, read_image
from vim.data.digit_scenes import CLASS_NAMES, DigitScenes
from vim.data.folders import split_names
from vim.data.listing import list_files, printable
from vim.data.masks import NO_CLASS, read_mask

_IMAGES = ("images", "image", "imgs", "img")
_MASKS = ("masks", "mask", "annotations", "labels")
_MASK_EXTENSIONS = (".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm")
_SHOWN = 3  # names in a message


class MaskPairs(Protocol):
    """Images of a split and their masks."""

    passed_over: Counter[str]
    """Number of other files, by kind."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Return an image, upright, and the values of its mask, (height, width), uint8 or uint16."""
        ...

    def name(self, index: int) -> str:
        """Return the name of an image, for messages."""
        ...

    def keys(self) -> Sequence[str] | None:
        """Return a name for each image that does not change when the data moves, or `None` without names."""
        ...


@runtime_checkable
class InstancePairs(MaskPairs, Protocol):
    """Pairs that also tell the objects of an image apart."""

    def instances(self, index: int) -> np.ndarray:
        """Return the number of the object in each pixel, (height, width); 0 is none."""
        ...


class FilePairs:
    """Images in one folder and masks of the same names in another.

    Args:
        root: Folder that holds both.
        images: Path of each image in it.
        masks: Path of the mask of each image.
        passed_over: Number of other files, by kind.
    """

    def __init__(self, root: Path, images: Sequence[str], masks: Sequence[str], passed_over: Counter[str]) -> None:
        self._root, self._images, self._masks, self.passed_over = root, images, masks, passed_over

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Return an image, upright, and the values of its mask, (height, width), uint8 or uint16."""
        image = read_image(self.name(index))
        path = self._root / self._masks[index]
        try:
            return image, read_mask(path)
        except OSError as error:
            raise OSError(f"its mask {path} cannot be read: {error}") from error

    def name(self, index: int) -> str:
        """Return the path of the image."""
        return str(self._root / self._images[index])

    def keys(self) -> Sequence[str]:
        """Return the path of each image below the folder."""
        return self._images


class ScenePairs:
    """Scenes of digits, composed as they are read; value 0 is the background, and digit d has value d + 1.

    Args:
        scenes: The scenes.
    """

    class_names = ("background", *CLASS_NAMES)

    def __init__(self, scenes: DigitScenes) -> None:
        self._scenes = scenes
        self.passed_over: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._scenes)

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Return a scene and its mask."""
        scene = self._scenes[index]
        mask = (scene.masks * (scene.labels + 1)[:, None, None]).sum(axis=0)
        return Image.fromarray(scene.image), mask.astype(np.uint8)

    def name(self, index: int) -> str:
        """Return the number of a scene, with its split."""
        return f"{self._scenes.split} scene {index}"

    def keys(self) -> None:
        """Return `None`: a scene is made from its number."""


def open_pairs(root: str, split: str, extensions: Sequence[str] = IMAGE_EXTENSIONS, mask_suffix: str = "") -> FilePairs:
    """Open the pairs of a split: `images/SPLIT` with `masks/SPLIT`, or `SPLIT/images` with `SPLIT/masks`.

    A mask has the name of its image, up to the ending. The folders may have other usual names: `annotations` or
    `labels` for `masks` and, for the splits, `training` and `validation`. ADE20K's layout is one of these.

    Args:
        root: The folder that holds all splits.
        split: The split.
        extensions: Endings of images, in either case.
        mask_suffix: What the name of a mask has after the name of its image.

    Raises:
        ValueError: The folders do not exist, hold no image, or an image has no mask; the message names the first ones.
        OSError: A folder cannot be read.
    """
    place = Path(root).expanduser()
    if not place.is_dir():
        raise ValueError(f"data.path must be a folder of images and masks, and {str(place)!r} is not a folder")
    image_folder, mask_folder = _find_folders(place, split)
    images = list_files(place / image_folder, extensions)
    masks = {
        Path(path).with_suffix("").as_posix(): path for path in list_files(place / mask_folder, _MASK_EXTENSIONS).paths
    }
    wanted = [Path(path).with_suffix("").as_posix() + mask_suffix for path in images.paths]
    without = [path for path, mask in zip(images.paths, wanted, strict=True) if mask not in masks]
    if not images.paths:
        raise ValueError(
            f"data.path has no images for the split {split!r} in {place / image_folder}: images end in "
            f"{', '.join(extensions)} (data.extensions)"
        )
    if without:
        raise ValueError(
            f"data.path: {len(without):,} of {len(images.paths):,} images in {place / image_folder} have no mask in "
            f"{place / mask_folder}, such as {', '.join(map(printable, without[:_SHOWN]))}: a mask has the name of its "
            f"image, then segmentation.mask_suffix {mask_suffix!r}, and ends in {', '.join(_MASK_EXTENSIONS)}"
        )
    found = [f"{mask_folder}/{masks[mask]}" for mask in wanted]
    return FilePairs(place, [f"{image_folder}/{path}" for path in images.paths], found, images.passed_over)


def _find_folders(root: Path, split: str) -> tuple[str, str]:
    """Return the folders of the images and of the masks of a split, relative to the root."""
    layouts = ("{kind}/{split}", "{split}/{kind}")
    tried = []
    for name in split_names(split):
        for layout in layouts:
            for images in _IMAGES:
                image_folder = layout.format(kind=images, split=name)
                tried.append(image_folder)
                if not (root / image_folder).is_dir():
                    continue
                masks = [layout.format(kind=kind, split=name) for kind in _MASKS]
                mask_folder = next((folder for folder in masks if (root / folder).is_dir()), None)
                if mask_folder is None:
                    raise ValueError(f"data.path {str(root)!r} has {image_folder}/, and none of {', '.join(masks)}")
                return image_folder, mask_folder
    raise ValueError(
        f"data.path {str(root)!r} must have the images of the split {split!r}, and has none of {', '.join(tried[:4])}, "
        "...: put them into images/train, masks/train, images/val and masks/val"
    )


def check_pairs(pairs: MaskPairs, to_labels: Callable[[np.ndarray], np.ndarray], most: int, title: str) -> None:
    """Read pairs spread over a split, and refuse the split if one of them does not fit.

    Args:
        pairs: The pairs.
        to_labels: Maps the values of a mask to labels.
        most: Number of pairs to read.
        title: The split, for the message.

    Raises:
        ValueError: A pair cannot be read, or has sizes or values that do not fit. The message counts these pairs and
            names the first. Or all pixels are of one class.
    """
    chosen = sorted({round(place) for place in np.linspace(0, len(pairs) - 1, min(most, len(pairs)))}) if most else []
    bad: list[str] = []
    found: set[int] = set()
    for index in chosen:
        try:
            _, labels = read_pair(pairs, index, to_labels)
        except BAD_IMAGE as error:
            bad.append(f"{printable(pairs.name(index))}: {describe_bad_image(error)}")
        else:
            found |= set(np.unique(labels).tolist())
    if bad:
        more = f"; and {len(bad) - _SHOWN:,} more" if len(bad) > _SHOWN else ""
        raise ValueError(
            f"{len(bad):,} of {len(chosen):,} checked {title} pairs do not fit: {'; '.join(bad[:_SHOWN])}{more}"
        )
    if chosen and len(found - {NO_CLASS}) < 2:
        raise ValueError(
            f"the masks of {len(chosen):,} checked {title} pairs have pixels of one class only"
            + (
                " and of segmentation.ignore_value: where that value is a class, as in masks of 0 and 255, set "
                "--segmentation.mask_values '[0, 255]' --segmentation.ignore_value null"
                if NO_CLASS in found
                else ""
            )
        )


def read_pair(
    pairs: MaskPairs, index: int, to_labels: Callable[[np.ndarray], np.ndarray]
) -> tuple[Image.Image, np.ndarray]:
    """Return an image and the labels of its pixels, (height, width), uint8.

    Raises:
        BAD_IMAGE: The image or the mask cannot be read, their sizes differ, or a value belongs to no class.
    """
    image, mask = pairs.read(index)
    if (image.height, image.width) != mask.shape:
        raise ValueError(
            f"its size is {image.width} x {image.height}, and the size of its mask is {mask.shape[1]} x {mask.shape[0]}"
        )
    return image, to_labels(mask)
