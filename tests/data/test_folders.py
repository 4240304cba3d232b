"""Tar files and WebDataset's shards give the same images and labels as folders do."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
import torch

from tests.training import tiny_config, write_image_folder
from vim.data.loaders import build_loaders
from vim.data.sources import open_image_sets

CPU = torch.device("cpu")
CLASSES = ["ant", "bee", "cat"]


@pytest.fixture
def images(tmp_path):
    return write_image_folder(tmp_path / "images", CLASSES, {"train": 8, "val": 3}, suffix=".png")


def config(dataset, path, **changes):
    return tiny_config(data__dataset=dataset, data__path=str(path), model__in_chans=3, **changes)


def add(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def write_shards(images, root, label=lambda label: (".cls", str(label).encode()), samples=5):
    """Write the splits of an image folder as shards of so many samples."""
    for split in ("train", "val"):
        files = sorted((images / split).rglob("*.png"))
        (root / split).mkdir(parents=True)
        for start in range(0, len(files), samples):
            with tarfile.open(root / split / f"{start:05d}.tar", "w") as archive:
                for index, file in enumerate(files[start : start + samples], start):
                    extension, data = label(CLASSES.index(file.parent.name))
                    add(archive, f"{index:06d}{extension}", data)
                    add(archive, f"{index:06d}.png", file.read_bytes())
                add(archive, f"{start + samples:06d}.png", b"an image without a label is left out")
    (root / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    return root


def everything(loaders):
    return torch.cat([images for images, _ in loaders.val]), torch.cat([labels for _, labels in loaders.val])


def test_a_tar_file_a_split_is_read_as_a_folder_is(images, tmp_path):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            archive.add(images / split, arcname=".")
    loaders = build_loaders(config("folder", tmp_path), CPU)
    expected = build_loaders(config("folder", images), CPU)
    assert loaders.class_names == expected.class_names == tuple(CLASSES)
    assert all(map(torch.equal, everything(loaders), everything(expected)))
    assert next(iter(loaders.train))[0].equal(next(iter(expected.train))[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_read_as_a_folder_is(images, tmp_path, workers):
    write_shards(images, tmp_path / "shards")
    loaders = build_loaders(config("wds/", tmp_path / "shards", data__workers=workers), CPU)
    expected = build_loaders(config("folder", images), CPU)
    assert loaders.class_names == tuple(CLASSES)
    assert all(map(torch.equal, everything(loaders), everything(expected)))
    assert next(iter(loaders.train))[0].equal(next(iter(expected.train))[0])


def test_labels_of_shards_may_be_in_json_and_classes_without_names(images, tmp_path):
    write_shards(images, tmp_path, lambda label: (".json", json.dumps({"label": label, "text": "x"}).encode()))
    (tmp_path / "classnames.txt").unlink()
    with pytest.raises(ValueError, match=r"model.num_classes must be set: data.dataset 'wds/' does not say"):
        open_image_sets(config("wds/", tmp_path))
    sets = open_image_sets(config("wds/", tmp_path, model__num_classes=3))
    assert sets.class_names == ("0", "1", "2")
    assert [sets.val.source.read(index)[1] for index in range(9)] == [0] * 3 + [1] * 3 + [2] * 3
    assert sets.val.source.name(7) == f"{tmp_path}/val/00005.tar:000007.png"


def test_a_label_beyond_the_classes_is_named_and_left_out(images, tmp_path, caplog):
    write_shards(images, tmp_path)
    (tmp_path / "classnames.txt").write_text("ant\nbee\n")
    loaders = build_loaders(config("wds/", tmp_path), CPU)
    assert torch.cat([labels for _, labels in loaders.val]).tolist() == [0] * 3 + [1] * 3
    assert loaders.val_unreadable.take() == 3
    assert "its label is 2, which is none of the 2 classes" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_shards_that_cannot_be_used_are_refused(images, tmp_path, damage):
    write_shards(images, tmp_path)
    shard = tmp_path / "train" / "00000.tar"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:3000])
    elif damage == "text":
        shard.write_text("not a tar file")
    else:
        for file in (tmp_path / "train").iterdir():
            file.unlink()
    reason = "must have shards for the split 'train'" if damage == "empty" else rf"damaged or no tar file, {shard}"
    with pytest.raises(ValueError, match=reason):
        open_image_sets(config("wds/", tmp_path))


def test_a_stream_is_refused_and_says_what_to_use():
    with pytest.raises(ValueError, match=r"'hfids/cifar10' is a stream: use hfds/NAME, or wds/"):
        open_image_sets(tiny_config(data__dataset="hfids/cifar10"))
    with pytest.raises(ValueError, match=r"data.path must name the folder of shards when data.dataset is 'wds/'"):
        tiny_config(data__dataset="wds/")
