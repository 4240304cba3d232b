"""Handwritten digits that come with scikit-learn: 1,797 grey images of 8 x 8 pixels, without a download."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vim.data.tensors import TensorImages

CLASS_NAMES = tuple("0123456789")
_HELD_OUT = 360
_SPLIT_SEED = 0


def load_digits(image_shape: tuple[int, int], in_chans: int) -> tuple[TensorImages, TensorImages]:
    """Read the digits, enlarged, in a fixed split: 1,437 for training and 360 held out.

    The split is stratified by digit.

    Args:
        image_shape: Height and width to enlarge the 8 x 8 pixels to.
        in_chans: Channels of the images; every channel holds the same grey values.

    Returns:
        The training images and the held-out images.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    parts = []
    for grey, labels in load_small_digits():
        images = _enlarge(torch.from_numpy(grey).float(), image_shape).repeat(1, in_chans, 1, 1)
        parts.append(TensorImages(images, torch.from_numpy(labels)))
    return parts[0], parts[1]


def load_small_digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Read the digits as they are, in the split of `load_digits`.

    Returns:
        For training and held out: ink, (digits, 8, 8), float64 from 0 to 1, and labels, (digits,), int64.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    bunch = datasets.load_digits()
    train, held_out = train_test_split(
        range(len(bunch.target)), test_size=_HELD_OUT, random_state=_SPLIT_SEED, stratify=bunch.target
    )
    ink, labels = bunch.images / 16, bunch.target.astype(np.int64)
    return (ink[train], labels[train]), (ink[held_out], labels[held_out])


def _enlarge(grey: Tensor, image_shape: tuple[int, int]) -> Tensor:
    """Return (images, 8, 8) values of 0 to 1 as (images, 1, height, width), uint8."""
    images = F.interpolate(grey[:, None] * 255, image_shape, mode="bicubic", align_corners=False, antialias=True)
    return images.round().clamp(0, 255).to(torch.uint8)
