"""Pascal VOC, Cityscapes and Hugging Face sets of masks: from a disk, in the layouts that torchvision checks."""

from __future__ import annotations

import socket

import datasets
import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import voc

from tests.tiny_runs import TINY_SEGMENTER, tiny_config, write_pairs
from vim.data.masks import NO_CLASS
from vim.data.segmentation import open_pair_sets


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Fail whoever looks up a host."""

    def refuse(*arguments, **options):
        raise AssertionError(f"the network was asked for {arguments[:2]}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def config_of(dataset, path, **changes):
    data = {"data__dataset": dataset, "data__path": None if path is None else str(path)}
    return tiny_config(**{**TINY_SEGMENTER, **data, **changes})


def save_image(path, value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 12, 3), value, dtype=np.uint8)).save(path)


def save_mask(path, values):
    """Write a mask with stripes of these values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.resize(np.array(values, dtype=np.uint8), (8, 12))).save(path)


def labels_of(pair_set, index=0):
    return pair_set.read(index)[1]


def write_voc(root):
    folder = root / "VOCdevkit" / "VOC2012"
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, names in {"train": ["2007_02", "2007_01"], "val": ["2008_01"]}.items():
        (lists / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            save_image(folder / "JPEGImages" / f"{name}.jpg")
            mask = Image.fromarray(np.resize(np.array([0, 15, 20, 255], dtype=np.uint8), (8, 12)))
            mask.putpalette([value for index in range(256) for value in (index, 0, 255 - index)])
            (folder / "SegmentationClass").mkdir(exist_ok=True)
            mask.save(folder / "SegmentationClass" / f"{name}.png")
    return root


def test_voc_is_read_with_its_names_and_its_border_is_no_class(tmp_path):
    sets = open_pair_sets(config_of("voc", write_voc(tmp_path)))
    assert (len(sets.class_names), sets.class_names[15]) == (21, "person")
    folder = "VOCdevkit/VOC2012/JPEGImages"
    assert sets.train.pairs.keys() == [f"{folder}/2007_01.jpg", f"{folder}/2007_02.jpg"]
    assert set(np.unique(labels_of(sets.val))) == {0, 15, 20, NO_CLASS}


def test_voc_is_fetched_only_when_it_is_asked_for_and_missing(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"'voc' .* cannot be opened: .*; vim.train downloads it with --data.download true"
    ):
        open_pair_sets(config_of("voc", tmp_path))
    fetched = []

    def fetch(url, root, filename, md5):
        fetched.append(filename)
        write_voc(tmp_path)

    monkeypatch.setattr(voc, "download_and_extract_archive", fetch)
    assert len(open_pair_sets(config_of("voc", tmp_path, data__download=True)).train) == 2
    assert fetched == ["VOCtrainval_11-May-2012.tar"]  # once for both splits


def test_cityscapes_is_read_with_the_19_classes_of_its_benchmark(tmp_path):
    for split, towns in {"train": ("ulm", "aachen"), "val": ("bonn",)}.items():
        for town in towns:
            name = f"{town}_000000_000019"
            save_image(tmp_path / "leftImg8bit" / split / town / f"{name}_leftImg8bit.png")
            save_mask(tmp_path / "gtFine" / split / town / f"{name}_gtFine_labelIds.png", [0, 7, 3, 26, 29, 33])
    sets = open_pair_sets(config_of("cityscapes", tmp_path))
    assert (len(sets.class_names), sets.class_names[0], sets.class_names[18]) == (19, "road", "bicycle")
    assert sets.train.pairs.keys()[0] == "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"
    assert set(np.unique(labels_of(sets.val))) == {0, 13, 18, NO_CLASS}


def test_cityscapes_is_not_fetched(tmp_path):
    with pytest.raises(ValueError, match=r"'cityscapes' .* cannot be opened: Dataset not found[^;]*$"):
        open_pair_sets(config_of("cityscapes", tmp_path))
    with pytest.raises(ValueError, match=r"data.download must be false for data.dataset 'cityscapes'"):
        open_pair_sets(config_of("cityscapes", tmp_path, data__download=True))


def test_a_set_without_its_folder_is_refused():
    with pytest.raises(ValueError, match=r"data.path must name the image folder when data.dataset is 'cityscapes'"):
        config_of("cityscapes", None)


def write_parquet(tmp_path):
    """Write pairs of files, which is returned, and the same as `set/SPLIT-0.parquet`."""
    source = write_pairs(tmp_path / "pairs", {"train": 3, "val": 2})
    (tmp_path / "set").mkdir()
    for split in ("train", "val"):
        columns = {
            column: [str(source / folder / split / f"{index}.png") for index in range(3 if split == "train" else 2)]
            for column, folder in (("image", "images"), ("annotation", "masks"))
        }
        features = datasets.Features({name: datasets.Image() for name in columns})
        name = "validation" if split == "val" else split
        datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "set" / f"{name}-0.parquet")
    return source


def test_a_set_of_hugging_face_has_images_and_masks_in_columns(tmp_path):
    source = write_parquet(tmp_path)
    changes = {"data__path": str(tmp_path / "cache"), "data__val_split": "validation"}
    config = config_of(f"hfds/{tmp_path}/set", None, **changes, segmentation__classes=("ground", "wall", "sky"))
    sets = open_pair_sets(config)
    assert [len(sets.train), len(sets.val)] == [3, 2]
    image, labels = sets.val.read(1)
    np.testing.assert_array_equal(image.numpy().transpose(1, 2, 0), Image.open(source / "images/val/1.png"))
    np.testing.assert_array_equal(labels, Image.open(source / "masks/val/1.png"))
    assert sets.val.pairs.name(1) == f"hfds/{tmp_path}/set validation[1]"
    assert sets.val.pairs.keys() is None


def test_columns_and_classes_of_a_set_of_hugging_face_are_asked_for(tmp_path):
    write_parquet(tmp_path)
    changes = {"data__path": str(tmp_path / "cache"), "data__val_split": "validation"}
    with pytest.raises(ValueError, match=r"segmentation.classes must name the classes"):
        open_pair_sets(config_of(f"hfds/{tmp_path}/set", None, **changes))
    with pytest.raises(ValueError, match=r"data.target_key must be one of its columns, \['image', 'annotation'\], got"):
        open_pair_sets(config_of(f"hfds/{tmp_path}/set", None, **changes, data__target_key="mask"))
