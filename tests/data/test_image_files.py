"""A damaged file, whatever its format and wherever the damage, is an unreadable image and no crash."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from vim.data.image_files import ImageFiles, ReaderSource
from vim.data.order import Place


class Files:
    """A reader of files in memory, as timm has it."""

    def __init__(self, contents):
        self.contents = contents

    def __len__(self):
        return len(self.contents)

    def __getitem__(self, index):
        return io.BytesIO(self.contents[index]), 0

    def filename(self, index, basename=False, absolute=False):
        return f"file {index}"


def damaged(data, random):
    """The file cut short, or with some of its bytes replaced."""
    data = bytearray(data)
    if random.random() < 0.3:
        return bytes(data[: random.integers(0, len(data))])
    for _ in range(random.integers(1, 12)):
        # Half of the damage in the header, where it does most.
        place = random.integers(0, len(data) if random.random() < 0.5 else min(60, len(data)))
        data[place] = random.integers(0, 256)
    return bytes(data)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about damaged tags
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_damage_never_ends_the_run(kind):
    random = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(file, kind)
    contents = [damaged(file.getvalue(), random) for _ in range(150)]
    images = ImageFiles(ReaderSource(Files(contents)), 2, "RGB", seed=0, replace=False)
    images.transform = lambda image: torch.zeros(1)
    read, labels, unreadable = images.__getitems__([Place(0, index, index) for index in range(len(contents))])
    assert len(read) == len(labels) == len(contents) - len(unreadable)
    assert len(unreadable) > 10
    assert all(reason and "\n" not in reason for _, reason in unreadable)
