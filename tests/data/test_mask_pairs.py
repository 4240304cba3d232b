"""Pairs of image and mask: where they are found, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.tiny_runs import TINY_SEGMENTER, tiny_config, write_pairs
from vim.data.digit_scenes import DigitScenes
from vim.data.mask_pairs import ScenePairs, check_pairs, open_pairs, read_pair
from vim.data.masks import MaskLabels
from vim.data.segmentation import open_pair_sets

LABELS = MaskLabels(3, ignore=(255,))


@pytest.mark.parametrize(
    "layout",
    [("images/{}", "masks/{}"), ("{}/images", "{}/masks"), ("images/{}", "annotations/{}"), ("{}/img", "{}/labels")],
)
def test_the_usual_layouts_are_found(tmp_path, layout):
    write_pairs(tmp_path, {"train": 3, "validation": 2}, layout=layout)
    train, val = open_pairs(str(tmp_path), "train"), open_pairs(str(tmp_path), "val")
    assert (len(train), len(val)) == (3, 2)
    image, labels = read_pair(train, 0, LABELS)
    assert image.size == (40, 36)
    assert (labels.shape, set(np.unique(labels))) == ((36, 40), {0, 1, 2})
    assert train.keys() == [f"{layout[0].format('train')}/{index}.png" for index in range(3)]


def test_a_mask_may_have_a_suffix_and_images_may_be_in_folders(tmp_path):
    write_pairs(tmp_path, {"train/a": 1, "train/b": 2})
    for mask in (tmp_path / "masks").rglob("*.png"):
        mask.rename(mask.with_name(f"{mask.stem}_seg.png"))
    assert len(open_pairs(str(tmp_path), "train", mask_suffix="_seg")) == 3


def test_images_without_a_mask_are_counted_and_named(tmp_path):
    write_pairs(tmp_path, {"train": 5})
    for index in (1, 3):
        (tmp_path / f"masks/train/{index}.png").unlink()
    with pytest.raises(ValueError, match=r"2 of 5 images in .*images/train have no mask in .*, such as 1.png, 3.png: "):
        open_pairs(str(tmp_path), "train")


def test_missing_folders_and_an_empty_split_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a folder of images and masks"):
        open_pairs(str(tmp_path / "none"), "train")
    with pytest.raises(ValueError, match="must have the images of the split 'train', and has none of images/train"):
        open_pairs(str(tmp_path), "train")
    (tmp_path / "images/train").mkdir(parents=True)
    with pytest.raises(ValueError, match="has images/train/, and none of masks/train"):
        open_pairs(str(tmp_path), "train")
    (tmp_path / "masks/train").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no images for the split 'train'"):
        open_pairs(str(tmp_path), "train")


def test_pairs_that_do_not_fit_are_counted_and_named(tmp_path):
    write_pairs(tmp_path, {"train": 6})
    Image.fromarray(np.zeros((3, 4), dtype=np.uint8)).save(tmp_path / "masks/train/0.png")
    Image.fromarray(np.full((36, 40), 9, dtype=np.uint8)).save(tmp_path / "masks/train/2.png")
    (tmp_path / "masks/train/3.png").write_bytes(b"no picture")
    (tmp_path / "images/train/4.png").write_bytes(b"no picture")
    pairs = open_pairs(str(tmp_path), "train")
    with pytest.raises(ValueError) as refusal:
        check_pairs(pairs, LABELS, 100, "training")
    message = str(refusal.value)
    assert message.startswith("4 of 6 checked training pairs do not fit: ")
    assert "0.png: its size is 40 x 36, and the size of its mask is 4 x 3" in message
    assert "2.png: its mask has the value 9, and must have 0 to 2" in message
    assert "3.png: its mask" in message
    assert message.endswith("and 1 more")
    check_pairs(pairs, LABELS, 0, "training")


def test_masks_of_0_and_255_are_not_taken_for_pixels_without_a_class(tmp_path):
    write_pairs(tmp_path, {"train": 2}, values=(0, 255))
    pairs = open_pairs(str(tmp_path), "train")
    with pytest.raises(
        ValueError, match=r"pixels of one class only and .*mask_values '\[0, 255\]' .*ignore_value null"
    ):
        check_pairs(pairs, MaskLabels(2, ignore=(255,)), 100, "training")
    check_pairs(pairs, MaskLabels(2, (0, 255)), 100, "training")


def test_scenes_are_as_the_settings_ask_and_at_most_500_are_held_out():
    scenes = {"segmentation__scenes": 4000, "segmentation__scene_digits": 1, "segmentation__checked": 2}
    sets = open_pair_sets(tiny_config(**TINY_SEGMENTER, **scenes, data__dataset="digit_scenes"))
    assert (len(sets.train), len(sets.val)) == (4000, 500)
    for index in range(10):
        assert len(np.unique(sets.train.read(index)[1])) == 2  # background and one digit


def test_the_mask_of_a_scene_has_the_digits_that_are_seen():
    scenes = DigitScenes("val", 48, 2, seed=0)
    _, mask = ScenePairs(scenes).read(1)
    for visible, label in zip(scenes[1].masks, scenes[1].labels, strict=True):
        assert set(mask[visible].tolist()) == {int(label) + 1}
    assert not mask[~scenes[1].masks.any(axis=0)].any()
