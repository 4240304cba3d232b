"""Samples of the held-out images as PNG files."""

from pathlib import Path

import torch
from PIL import Image

from vim.data.tensors import TensorImages

_MOST = 10  # classes


def write_samples(folder: Path, images: TensorImages, class_names: tuple[str, ...]) -> list[Path]:
    """Write the first image of each class, for up to ten classes, as `CLASS_INDEX.png`.

    Args:
        folder: The folder of the files; created if it does not exist.
        images: The images.
        class_names: Name of each class, in the order of the labels.

    Returns:
        The paths of the files.
    """
    folder.mkdir(exist_ok=True)
    paths = []
    for label, name in list(enumerate(class_names))[:_MOST]:
        found = (images.labels == label).nonzero()
        if len(found):
            index = int(found[0])
            paths.append(folder / f"{name}_{index:04d}.png")
            _to_image(images.images[index]).save(paths[-1])
    return paths


def _to_image(pixels: torch.Tensor) -> Image.Image:
    """Return (channels, height, width), uint8, as an image."""
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
