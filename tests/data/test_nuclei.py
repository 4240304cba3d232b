"""The tiles of the nuclei, and what is said without the package that holds them."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from PIL import Image

from vim.data import nuclei
from vim.data.mask_pairs import InstancePairs
from vim.data.nuclei import NucleiPairs


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with two small files in place of stardist's."""
    folder = tmp_path / "stardist" / "data" / "images"
    folder.mkdir(parents=True)
    pixels = np.arange(64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(pixels).save(folder / "img2d.tif")
    instances = np.zeros((8, 8), dtype=np.uint16)
    instances[0, 0], instances[6, 6] = 300, 2
    Image.fromarray(instances).save(folder / "mask2d.tif")
    spec = importlib.util.spec_from_loader("stardist", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "stardist")]
    monkeypatch.setattr(nuclei.importlib.util, "find_spec", lambda name: spec)
    return folder


def test_three_tiles_are_for_training_and_the_fourth_is_held_out(package):
    train, held_out = NucleiPairs(True), NucleiPairs(False)
    assert (len(train), len(held_out)) == (3, 1)
    image, mask = train.read(0)
    assert np.asarray(image).tolist()[0] == [0, 1, 2, 3]
    assert (mask.dtype, mask.sum(), mask[0, 0]) == (np.uint8, 1, 1)
    image, mask = held_out.read(0)
    assert np.asarray(image)[0, 0] == 36
    assert mask[2, 2] == 1
    assert isinstance(held_out, InstancePairs)
    assert (train.instances(0)[0, 0], held_out.instances(0).max()) == (300, 2)
    seen = {int(value) for index in range(3) for value in np.asarray(train.read(index)[0]).flat}
    assert seen.isdisjoint(np.asarray(image).flat)


def test_a_missing_package_is_named_with_its_pip_line(monkeypatch):
    monkeypatch.setattr(nuclei.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs img2d.tif and mask2d.tif of .*: pip install --no-deps stardist"):
        NucleiPairs(True)


def test_a_damaged_file_is_named(package):
    (package / "img2d.tif").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"cannot be read .*pip install --no-deps stardist --force-reinstall"):
        NucleiPairs(True)
