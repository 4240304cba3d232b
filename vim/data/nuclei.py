"""Nuclei under a microscope: the labelled image in PyPI's package stardist, cut into four tiles.

The image is of the 2018 Data Science Bowl (BBBC038): 512 x 512 pixels with 16 bits, and 125 nuclei.
"""

import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from vim.data.decoding import BAD_IMAGE, read_image

CLASS_NAMES = ("background", "nucleus")
_INSTALL = "pip install --no-deps stardist"
_FILES = ("img2d.tif", "mask2d.tif")


class NucleiPairs:
    """Tiles of the image with masks of background (0) and nucleus (1): three to train on, the last one held out.

    Args:
        is_train: Take the three tiles of the training split.

    Raises:
        ValueError: stardist is not installed, or its files are not there; the message says how to install it.
    """

    def __init__(self, is_train: bool) -> None:
        image, instances = _read_files(_find_folder())
        height, width = instances.shape[0] // 2, instances.shape[1] // 2
        corners = [(top, left) for top in (0, height) for left in (0, width)]
        self._tiles = []
        for top, left in corners[:3] if is_train else corners[3:]:
            tile = image.crop((left, top, left + width, top + height))
            self._tiles.append((tile, instances[top : top + height, left : left + width]))
        self._split = "training" if is_train else "held-out"
        self.passed_over: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._tiles)

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Return a tile and its mask, (height, width), uint8."""
        tile, instances = self._tiles[index]
        return tile, (instances > 0).astype(np.uint8)

    def instances(self, index: int) -> np.ndarray:
        """Return the number of the nucleus in each pixel of a tile, (height, width); 0 is none."""
        return self._tiles[index][1]

    def name(self, index: int) -> str:
        """Return the number of a tile, with its split."""
        return f"{self._split} tile {index} of the nuclei"

    def keys(self) -> None:
        """Return `None`: the tiles are no files."""


def _find_folder() -> Path:
    """Return the folder of the two files, without importing stardist, which needs more than it brings."""
    found = importlib.util.find_spec("stardist")
    places = list(found.submodule_search_locations or ()) if found is not None else []
    for place in places:
        folder = Path(place) / "data" / "images"
        if all((folder / name).is_file() for name in _FILES):
            return folder
    raise ValueError(f"data.dataset 'nuclei' needs {' and '.join(_FILES)} of the package stardist: {_INSTALL}")


def _read_files(folder: Path) -> tuple[Image.Image, np.ndarray]:
    """Return the image, and the number of a nucleus in each pixel, (height, width)."""
    try:
        image, instances = (read_image(folder / name) for name in _FILES)
    except BAD_IMAGE as error:
        raise ValueError(f"{folder} cannot be read ({error}): {_INSTALL} --force-reinstall") from error
    if image.size != instances.size:
        raise ValueError(f"{folder} must have two files of one size, got {image.size} and {instances.size}")
    return image, np.asarray(instances)
