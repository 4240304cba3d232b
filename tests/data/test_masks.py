"""Masks in files of every kind, and the labels of their values."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vim.data.masks import NO_CLASS, MaskLabels, read_mask

VALUES = np.array([[0, 1, 2], [2, 1, 255]], dtype=np.uint8)


def save(path, image):
    image.save(path)
    return path


def test_grey_palette_and_repeated_colours_give_the_same_values(tmp_path):
    grey = Image.fromarray(VALUES)
    palette = grey.copy()
    palette.putpalette([200, 10, 10, 3, 3, 200] + [9] * 762)
    images = {"grey": grey, "palette": palette, "rgb": grey.convert("RGB"), "rgba": grey.convert("RGBA")}
    for name, image in {**images, "la": grey.convert("LA")}.items():
        np.testing.assert_array_equal(read_mask(save(tmp_path / f"{name}.png", image)), VALUES, err_msg=name)


def test_masks_of_1_and_16_bits(tmp_path):
    bits = read_mask(save(tmp_path / "bits.png", Image.fromarray(VALUES == 1)))
    np.testing.assert_array_equal(bits, VALUES == 1)
    wide = VALUES.astype(np.uint16) * 200
    for ending in ("png", "tif"):
        np.testing.assert_array_equal(read_mask(save(tmp_path / f"wide.{ending}", Image.fromarray(wide))), wide)


def test_colours_and_fractions_are_refused(tmp_path):
    colors = np.zeros((2, 3, 3), dtype=np.uint8)
    colors[0, 0] = 10, 20, 30
    with pytest.raises(ValueError, match=r"its mask is a colour picture \(mode 'RGB'"):
        read_mask(save(tmp_path / "colors.png", Image.fromarray(colors)))
    with pytest.raises(ValueError, match="its mask has pixels of float32"):
        read_mask(save(tmp_path / "float.tif", Image.fromarray(np.zeros((2, 3), dtype=np.float32))))
    with pytest.raises(ValueError, match="values from 0 to 65535, got 0 to 70000"):
        read_mask(save(tmp_path / "int.tif", Image.fromarray(np.array([[0, 70000]], dtype=np.int32))))


def test_values_become_labels():
    np.testing.assert_array_equal(MaskLabels(3, ignore=(255,))(VALUES), [[0, 1, 2], [2, 1, NO_CLASS]])
    wide = np.array([[0, 1000, 65535]], dtype=np.uint16)
    np.testing.assert_array_equal(MaskLabels(2, (1000, 65535), (0,))(wide), [[NO_CLASS, 0, 1]])
    np.testing.assert_array_equal(MaskLabels(2, (0, 255))(np.array([[0, 255]])), [[0, 1]])


def test_a_value_of_no_class_is_named():
    with pytest.raises(ValueError, match=r"has the values 2, 255, and must have 0 to 1 .*2 classes\)$"):
        MaskLabels(2)(VALUES)
    with pytest.raises(ValueError, match=r"has the value 2, and must have 0, 5 .*or 255 \(segmentation.ignore_value\)"):
        MaskLabels(2, (0, 5), (255,))(np.array([[0, 2, 255]]))
