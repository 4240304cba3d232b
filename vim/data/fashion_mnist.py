"""Fashion-MNIST: 70,000 grey images of clothes, 28 x 28 pixels, from the idx files of Debian's package.

Source: Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747.
"""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vim.data.tensors import TensorImages

CLASS_NAMES = (
    "T-shirt or top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_INSTALL = "apt-get install dataset-fashion-mnist"
_SIDE = 28
_IMAGES_MAGIC, _LABELS_MAGIC = 2051, 2049  # unsigned bytes with three axes, and with one
_MOST_IMAGES = 1_000_000


def load_fashion_mnist(
    folder: Path | None, image_shape: tuple[int, int], in_chans: int
) -> tuple[TensorImages, TensorImages]:
    """Read the training and the test images.

    Args:
        folder: Holds `train-images-idx3-ubyte.gz` and the other three files; `None` is the folder of Debian's package.
        image_shape: Height and width to resize the 28 x 28 pixels to.
        in_chans: Channels of the images; every channel holds the same grey values.

    Returns:
        The training images and the test images.

    Raises:
        ValueError: The files are missing (the message says how to install them), damaged or of another kind.
    """
    place = DEBIAN_FOLDER if folder is None else folder
    return _load_part(place, "train", image_shape, in_chans), _load_part(place, "t10k", image_shape, in_chans)


def _load_part(folder: Path, part: str, image_shape: tuple[int, int], in_chans: int) -> TensorImages:
    pixels = _read_idx(folder / f"{part}-images-idx3-ubyte.gz", _IMAGES_MAGIC, (_SIDE, _SIDE))
    labels = _read_idx(folder / f"{part}-labels-idx1-ubyte.gz", _LABELS_MAGIC, ())
    if len(pixels) != len(labels):
        raise ValueError(f"{folder} has {len(pixels)} images and {len(labels)} labels of the part {part!r}")
    if len(labels) == 0 or labels.max() >= len(CLASS_NAMES):
        raise ValueError(f"{folder} must have labels from 0 to {len(CLASS_NAMES) - 1} for the part {part!r}")
    images = _resize(torch.from_numpy(pixels)[:, None], image_shape).repeat(1, in_chans, 1, 1)
    return TensorImages(images, torch.from_numpy(labels).long())


def _read_idx(path: Path, magic: int, shape: tuple[int, ...]) -> np.ndarray:
    """Read a compressed idx file of unsigned bytes, (count, *shape), up to the size in its header."""
    if not path.is_file():
        raise ValueError(
            f"data.dataset 'fashion_mnist' needs {path}, which does not exist: {_INSTALL}, or name the folder of the "
            "four files with --data.path"
        )
    try:
        with gzip.open(path) as file:
            return _read_array(file, path, magic, shape)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or not a gzip file: {error}") from error


def _read_array(file: gzip.GzipFile, path: Path, magic: int, shape: tuple[int, ...]) -> np.ndarray:
    axes = 1 + len(shape)
    header = file.read(4 * (1 + axes))
    if len(header) < 4 * (1 + axes):
        raise ValueError(f"{path} is not an idx file: it ends in its header")
    found_magic, count, *found_shape = struct.unpack(f">{1 + axes}I", header)
    if found_magic != magic or tuple(found_shape) != shape or count > _MOST_IMAGES:
        raise ValueError(
            f"{path} must be an idx file with magic number {magic}, at most {_MOST_IMAGES:,} entries of shape {shape}; "
            f"got magic number {found_magic}, {count:,} entries of shape {tuple(found_shape)}"
        )
    size = count * int(np.prod(shape, dtype=np.int64))
    data = file.read(size + 1)
    if len(data) != size:
        raise ValueError(
            f"{path} must hold {size:,} bytes after its header, got {'more' if len(data) > size else len(data)}"
        )
    return np.frombuffer(bytearray(data), dtype=np.uint8).reshape(count, *shape)


def _resize(images: Tensor, image_shape: tuple[int, int]) -> Tensor:
    """Return (images, 1, 28, 28) as (images, 1, height, width), uint8."""
    if image_shape == (_SIDE, _SIDE):
        return images
    parts = [
        F.interpolate(part.float(), image_shape, mode="bicubic", align_corners=False, antialias=True)
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
        for part in images.split(4096)
    ]
    return torch.cat(parts)
