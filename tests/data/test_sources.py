"""Which images a setting names, and what is refused before a run begins."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.tiny_runs import change, tiny_config, write_image_folder
from vim.data.folders import find_split
from vim.data.image_files import ImageFiles
from vim.data.sources import first_readable_file, open_image_sets
from vim.data.tensors import TensorImages


def folder_config(path, **changes):
    return tiny_config(data__dataset="folder", data__path=str(path), **changes)


def test_a_folder_gives_its_classes_in_order_and_the_same_labels_in_both_splits(tmp_path):
    write_image_folder(tmp_path, ["cat", "ant", "bee"], {"train": 3, "validation": 2})
    shutil.rmtree(tmp_path / "validation" / "bee")  # a class that is held out of the held-out images
    sets = open_image_sets(folder_config(tmp_path))
    assert sets.class_names == ("ant", "bee", "cat")
    assert (len(sets.train), len(sets.val)) == (9, 4)
    labels = [sets.val.source.read(index)[1] for index in range(4)]
    assert [sets.class_names[label] for label in labels] == ["ant", "ant", "cat", "cat"]
    assert first_readable_file(sets.val) == tmp_path / "validation" / "ant" / "0.jpg"
    assert isinstance(sets.train, ImageFiles)


def test_a_missing_held_out_split_is_refused_and_not_replaced_by_the_training_images(tmp_path):
    write_image_folder(tmp_path, ["ant", "bee"], {"train": 2})
    with pytest.raises(
        ValueError, match=r"must have a folder or tar file for the split 'val': found none of val/, valid/"
    ):
        open_image_sets(folder_config(tmp_path))


@pytest.mark.parametrize(("asked", "there"), [("val", "validation"), ("train", "training"), ("fold1", "fold1")])
def test_a_split_is_found_under_its_own_and_its_usual_names(tmp_path, asked, there):
    (tmp_path / there).mkdir()
    assert find_split(tmp_path, asked) == tmp_path / there


def test_a_folder_that_is_not_one_of_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data.path must be a folder of images, and '.*nowhere' is not a folder"):
        open_image_sets(folder_config(tmp_path / "nowhere"))
    (tmp_path / "train" / "ant").mkdir(parents=True)
    (tmp_path / "val").mkdir()
    (tmp_path / "train" / "ant" / "0.heic").touch()
    with pytest.raises(ValueError, match=r"data.path has no images for the split 'train' in .*, which holds 1 .heic"):
        open_image_sets(folder_config(tmp_path))


def test_a_held_out_split_without_folders_is_refused_by_name(tmp_path):
    """ImageNet's own layout."""
    write_image_folder(tmp_path, ["ant", "bee"], {"train": 2})
    (tmp_path / "val").mkdir()
    for index in range(3):
        shutil.copy(tmp_path / "train" / "ant" / "0.jpg", tmp_path / "val" / f"ILSVRC2012_val_{index:08d}.JPEG")
    words = r"one folder per class in .*val: 3 of 3 images are not in .* such as ILSVRC2012_val_00000000.JPEG"
    with pytest.raises(ValueError, match=words):
        open_image_sets(folder_config(tmp_path))


def test_a_held_out_split_of_one_class_with_folders_in_it_is_that_class(tmp_path):
    write_image_folder(tmp_path, ["benign", "malignant"], {"train": 2})
    write_image_folder(tmp_path / "val", ["p1", "p2"], {"benign": 1})
    sets = open_image_sets(folder_config(tmp_path))
    assert sets.class_names == ("benign", "malignant")
    assert list(sets.val.source.labels()) == [0, 0]


def test_the_endings_of_images_are_a_setting(tmp_path):
    write_image_folder(tmp_path, ["ant", "bee"], {"train": 2, "val": 1}, suffix=".webp")
    shutil.copy(tmp_path / "train" / "ant" / "0.webp", tmp_path / "train" / "ant" / "9.picture")
    assert len(open_image_sets(folder_config(tmp_path)).train) == 4
    sets = open_image_sets(folder_config(tmp_path, data__extensions=(".webp", ".Picture")))
    assert len(sets.train) == 5
    with pytest.raises(ValueError, match=r"which holds 4 .webp, 1 .picture: images end in .jpg \(data.extensions\)"):
        open_image_sets(folder_config(tmp_path, data__extensions=(".jpg",)))


def test_the_file_to_try_a_model_on_can_be_read_and_named(tmp_path):
    write_image_folder(tmp_path, ["ant", "bee"], {"train": 2, "val": 2})
    (tmp_path / "val" / "ant" / "0.jpg").write_bytes(b"no image")
    os.rename(tmp_path / "val" / "ant" / "1.jpg", os.fsencode(tmp_path / "val" / "ant") + b"/\xe9.jpg")
    sets = open_image_sets(folder_config(tmp_path))
    assert first_readable_file(sets.val) == tmp_path / "val" / "bee" / "0.jpg"
    assert first_readable_file(sets.val, tries=2) is None


def test_one_class_is_not_enough(tmp_path):
    write_image_folder(tmp_path, ["ant"], {"train": 2, "val": 2})
    with pytest.raises(ValueError, match="at least two classes, one folder each, in the split 'train', found 1"):
        open_image_sets(folder_config(tmp_path))


def test_a_held_out_class_that_is_not_trained_on_is_refused(tmp_path):
    write_image_folder(tmp_path, ["ant", "bee"], {"train": 2, "val": 2})
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "cow")
    with pytest.raises(
        ValueError, match="has a class 'cow' among its held-out images that the 2 classes of the model lack: ant, bee"
    ):
        open_image_sets(folder_config(tmp_path))


def test_a_number_of_classes_other_than_the_data_has_is_refused(tmp_path):
    write_image_folder(tmp_path, ["ant", "bee"], {"train": 2, "val": 2})
    with pytest.raises(ValueError, match=r"model.num_classes must be null or .* 2 \(ant, bee\), got 1000"):
        open_image_sets(folder_config(tmp_path, model__num_classes=1000))


def test_images_in_memory_are_augmented_when_trained_on_and_only_then():
    sets = open_image_sets(tiny_config(data__dataset="digits", augment__hflip=0.5))
    assert isinstance(sets.train, TensorImages)
    assert sets.train.augment.hflip == 0.5
    assert sets.val.augment is None


@pytest.mark.parametrize(("setting", "value"), [("auto_augment", "rand-m9"), ("color_jitter", 0.4)])
def test_an_augmentation_that_works_on_files_only_is_refused_for_images_in_memory(setting, value):
    with pytest.raises(ValueError, match=rf"augment.{setting} must be null for data.dataset 'digits'.* got {value!r}"):
        open_image_sets(change(tiny_config(data__dataset="digits"), **{f"augment__{setting}": value}))


def test_an_unknown_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data.dataset must be 'folder', .*'digits'.* got 'digit'"):
        open_image_sets(tiny_config(data__dataset="digit"))
    with pytest.raises(
        ValueError,
        match=r"data.dataset 'torch/mnist' .* cannot be opened: Dataset not found.*with --data.download true",
    ):
        open_image_sets(tiny_config(data__dataset="torch/mnist", data__path=str(tmp_path)))


def test_synthetic_images_are_the_same_for_the_same_seed():
    first, again = (open_image_sets(tiny_config(seed=3)) for _ in range(2))
    other = open_image_sets(tiny_config(seed=4))
    assert (len(first.train), len(first.val)) == (48, 12)
    assert first.train.images.equal(again.train.images)
    assert not first.train.images.equal(other.train.images)
