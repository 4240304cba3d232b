"""From an image file to an input, step by step as the original evaluates."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vim
from tests.tiny_runs import tiny_config
from vim.data.preprocessing import Preprocessing, per_channel

assert vim  # registers the models


def test_an_image_is_resized_cropped_and_normalised_as_the_original_does():
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    config = tiny_config(
        model__img_size=224,
        model__in_chans=3,
        data__crop_pct=0.875,
        data__mean=(0.485, 0.456, 0.406),
        data__std=(0.229, 0.224, 0.225),
    )
    result = Preprocessing.from_config(config).transform()(image)
    resized = image.resize((341, 256), Image.Resampling.BICUBIC)  # the shorter side to int(224 / 0.875)
    left, top = round((341 - 224) / 2), 16
    cropped = torch.from_numpy(np.array(resized.crop((left, top, left + 224, top + 224)))).permute(2, 0, 1) / 255
    mean, std = torch.tensor(config.data.mean), torch.tensor(config.data.std)
    torch.testing.assert_close(result, (cropped - mean[:, None, None]) / std[:, None, None])


def test_a_model_brings_the_preprocessing_of_its_weights():
    model = timm.create_model("vim_tiny_patch16_224", depth=1)
    preprocessing = Preprocessing.from_model(model)
    assert preprocessing.input_size == (3, 224, 224)
    assert (preprocessing.crop_pct, preprocessing.interpolation) == (0.875, "bicubic")
    assert preprocessing.mean == (0.485, 0.456, 0.406)


def test_an_image_of_any_mode_is_converted_to_the_channels_of_the_model():
    transform = Preprocessing.from_config(tiny_config(model__img_size=(8, 12))).transform()
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK"):
        assert transform(Image.new(mode, (20, 20))).shape == (1, 8, 12)


def test_one_value_stands_for_every_channel():
    assert per_channel((0.5,), 3) == (0.5, 0.5, 0.5)
    assert per_channel((0.1, 0.2), 2) == (0.1, 0.2)
    with pytest.raises(ValueError, match=r"one for each of in_chans = 3 channels, got \(0.1, 0.2\)"):
        per_channel((0.1, 0.2), 3)
