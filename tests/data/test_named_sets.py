"""Data sets of torchvision and Hugging Face: from a disk, without the network unless it is asked for."""

from __future__ import annotations

import importlib.util
import pickle
import socket

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch

from tests.tiny_runs import tiny_config, write_image_folder
from vim.data.loaders import build_loaders
from vim.data.sources import open_image_sets


@pytest.fixture
def no_network(monkeypatch):
    """Fail whoever looks up a host."""

    def refuse(*arguments, **options):
        raise AssertionError(f"the network was asked for {arguments[:2]}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def config(dataset, path, **changes):
    return tiny_config(data__dataset=dataset, data__path=None if path is None else str(path), **changes)


def write_cifar10(root):
    """Files like those of CIFAR-10, as torchvision reads them when their checksums are not looked at."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name in [*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"]:
        entry = {"data": random.integers(0, 256, (6, 3072), dtype=np.uint8), "labels": [0, 1, 2, 3, 4, 9]}
        (folder / name).write_bytes(pickle.dumps(entry))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return root


def test_cifar_is_read_through_timm_in_the_channels_of_the_model(tmp_path, monkeypatch, no_network):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    loaders = build_loaders(config("torch/cifar10", write_cifar10(tmp_path), augment__hflip=0.5), torch.device("cpu"))
    assert loaders.class_names[3] == "cat"
    images, labels = next(iter(loaders.val))
    assert images.shape == (6, 1, 16, 16)  # colour images in a model for grey ones
    assert labels.tolist() == [0, 1, 2, 3, 4, 9]
    assert next(iter(loaders.train))[0].shape == (16, 1, 16, 16)
    assert loaders.sets.val.source.name(2) == "torch/cifar10 val[2]"


def test_a_data_set_that_is_not_there_is_not_fetched(tmp_path, no_network):
    with pytest.raises(ValueError, match=r"'torch/cifar10' .* cannot be opened: .*; vim.train downloads it with"):
        open_image_sets(config("torch/cifar10", tmp_path))


def test_inaturalist_is_read_from_its_folders(tmp_path):
    names = ("00000_Animalia_A_B_C_D_E_f", "00001_Plantae_A_B_C_D_E_g")
    for split, count in (("2021_train", 8), ("2021_valid", 2)):
        write_image_folder(tmp_path, list(names), {split: count})
    loaders = build_loaders(config("torch/inaturalist", tmp_path), torch.device("cpu"))
    assert loaders.class_names == names
    assert torch.cat([labels for _, labels in loaders.val]).tolist() == [0, 0, 1, 1]


def test_a_package_that_is_missing_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else find(name))
    with pytest.raises(ModuleNotFoundError, match=r'needs the package datasets: pip install "vimamba\[data\]"'):
        open_image_sets(config("hfds/cifar10", None))


def write_parquet(tmp_path):
    """Write the same images as a folder of files, which is returned, and as `set/SPLIT-0.parquet`."""
    source = write_image_folder(tmp_path / "images", ["ant", "bee"], {"train": 9, "test": 2}, suffix=".png")
    columns = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["ant", "bee"])})
    for split in ("train", "test"):
        files = sorted((source / split).rglob("*.png"))
        rows = {"img": list(map(str, files)), "fine_label": [file.parent.name for file in files]}
        table = datasets.Dataset.from_dict(rows, features=columns)
        table.to_parquet(str(tmp_path / "set" / f"{split}-0.parquet"))
    return source


COLUMNS = {"data__input_key": "img", "data__target_key": "fine_label", "data__val_split": "test"}


def test_a_folder_of_parquet_files_is_read_by_datasets(tmp_path, no_network):
    source = write_parquet(tmp_path)
    loaders = build_loaders(
        config(f"hfds/{tmp_path}/set", tmp_path / "cache", model__in_chans=3, **COLUMNS), torch.device("cpu")
    )
    expected = build_loaders(config("folder", source, model__in_chans=3), torch.device("cpu"))
    assert loaders.class_names == ("ant", "bee")
    for (images, labels), (expected_images, expected_labels) in zip(loaders.val, expected.val, strict=True):
        assert images.equal(expected_images)
        assert labels.equal(expected_labels)


def test_a_set_of_hugging_face_that_is_not_here_is_not_fetched(tmp_path, no_network):
    with pytest.raises(
        ValueError,
        match=r"'hfds/nobody/nothing' .* cannot be opened: .*vim.train downloads it with --data.download true",
    ):
        open_image_sets(config("hfds/nobody/nothing", tmp_path))


@pytest.fixture
def lookups(monkeypatch):
    """Collect the hosts that are looked up, in a process that may reach the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    tried = []

    def refuse(host, *arguments, **options):
        tried.append(host)
        raise OSError("refused")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


def test_a_set_of_the_hub_is_read_from_the_cache_without_asking_the_hub(tmp_path, lookups):
    write_parquet(tmp_path)
    cache = tmp_path / "cache"
    datasets.load_dataset(str(tmp_path / "set"), cache_dir=str(cache))
    (cache / "set").rename(cache / "somebody___set")  # as `datasets` names what it has fetched of the hub
    loaders = build_loaders(config("hfds/somebody/set", cache, model__in_chans=3, **COLUMNS), torch.device("cpu"))
    assert loaders.class_names == ("ant", "bee")
    assert [len(loaders.sets.train), len(loaders.sets.val)] == [18, 4]
    with pytest.raises(ValueError, match=r"'hfds/somebody/other' .* cannot be opened"):
        open_image_sets(config("hfds/somebody/other", cache))
    assert lookups == []


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
def test_a_folder_that_names_files_elsewhere_is_not_fetched(name, tmp_path, lookups):
    write_parquet(tmp_path)
    text = "configs: [{config_name: default, data_files: [{split: train, path: 'hf://datasets/a/b/c.parquet'}]}]\n"
    (tmp_path / "set" / name).write_text(f"---\n{text}---\n# A set\n" if name == "README.md" else text)
    with pytest.raises(ValueError, match="names files that are not on this machine"):
        open_image_sets(config(f"hfds/{tmp_path}/set", tmp_path / "cache", **COLUMNS))
    assert lookups == []


def test_a_column_that_is_not_there_is_named(tmp_path, no_network):
    write_parquet(tmp_path)
    with pytest.raises(ValueError, match=r"data.input_key must be one of its columns, \['img', 'fine_label'\], got"):
        open_image_sets(config(f"hfds/{tmp_path}/set", tmp_path / "cache"))
