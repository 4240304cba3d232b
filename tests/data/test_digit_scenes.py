"""Scenes of digits: what is in them, and that they depend on split, seed and index alone."""

from __future__ import annotations

import numpy as np
import pytest

from vim.data.digit_scenes import CLASS_NAMES, DigitScenes
from vim.data.digits import load_small_digits


def test_a_scene_has_an_image_and_a_visible_mask_and_a_label_for_each_digit():
    labels, overlaps, counts = set(), 0, set()
    for scene in DigitScenes("train", 64, 60, seed=0):
        assert scene.image.shape == (64, 64, 3)
        assert scene.image.dtype == np.uint8
        assert scene.masks.dtype == bool
        assert scene.masks.shape == (len(scene.labels), 64, 64)
        assert scene.masks.any(axis=(1, 2)).all()
        assert scene.masks.sum(axis=0).max() == 1  # each pixel shows one digit
        touching = sum(
            (np.roll(a, 1, axis) & b).any() for a in scene.masks for b in scene.masks for axis in (0, 1) if a is not b
        )
        overlaps += touching > 0
        labels |= set(scene.labels.tolist())
        counts.add(len(scene.labels))
    assert labels == set(range(len(CLASS_NAMES)))
    assert counts == {1, 2, 3, 4, 5}
    assert overlaps > 5


def test_scenes_have_the_number_and_the_sizes_of_digits_that_are_asked_for():
    scenes = DigitScenes("train", 64, 30, seed=0, most_digits=2, sides=(0.5, 0.6))
    heights = [np.ptp(mask.any(axis=1).nonzero()[0]) + 1 for scene in scenes for mask in scene.masks[-1:]]
    assert {len(scene.labels) for scene in scenes} == {1, 2}
    assert 28 <= max(heights) <= 38 < 64


def bounds(mask):
    """First and last row and column of a digit's pixels."""
    return [side for axis in (1, 0) for side in mask.any(axis=axis).nonzero()[0][[0, -1]].tolist()]


def test_the_boxes_of_digits_overlap_no_more_than_is_asked_for():
    def apart(overlap):
        scenes = DigitScenes("train", 64, 40, seed=0, most_digits=3, sides=(0.4, 0.5), overlap=overlap)
        found = [[bounds(mask) for mask in scene.masks] for scene in scenes]
        assert {len(boxes) for boxes in found} >= {1, 2}
        return [
            a[1] < b[0] or b[1] < a[0] or a[3] < b[2] or b[3] < a[2]
            for boxes in found
            for i, a in enumerate(boxes)
            for b in boxes[:i]
        ]

    assert all(apart(0.0))
    some, most = (sum(pairs) / len(pairs) for pairs in (apart(0.25), apart(1.0)))
    assert most < some < 1


def test_a_digit_is_brighter_than_its_background():
    scene = DigitScenes("val", 48, 1, seed=3)[0]
    digits = scene.masks.any(axis=0)
    assert scene.image[digits].mean() > scene.image[~digits].mean() + 40


def test_scenes_depend_on_split_size_seed_and_index_alone():
    scenes = DigitScenes("train", 40, 5, seed=1)
    last = scenes[4].image
    scenes[0]
    np.testing.assert_array_equal(DigitScenes("train", 40, 9, seed=1)[4].image, last)
    for other in (DigitScenes("val", 40, 5, 1)[4], DigitScenes("train", 40, 5, 2)[4], scenes[3]):
        assert not np.array_equal(other.image, last)


def test_training_and_held_out_digits_are_apart():
    (train, _), (held_out, _) = load_small_digits()
    assert len(train) == 1437
    assert len(held_out) == 360
    scenes = {split: DigitScenes(split, 32, 1, 0) for split in ("train", "val")}
    np.testing.assert_array_equal(scenes["train"]._digits, train)
    np.testing.assert_array_equal(scenes["val"]._digits, held_out)


def test_an_index_out_of_range_is_refused():
    with pytest.raises(IndexError, match="from 0 to 1, got 2"):
        DigitScenes("train", 32, 2, 0)[2]
    assert len(list(DigitScenes("train", 32, 2, 0))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("test", 64, 1, 0), "split must be one of 'train', 'val', got 'test'"),
        (("val", 31, 1, 0), "size must be >= 32"),
        (("val", 64, 0, 0), "count must be >= 1"),
        (("val", 64, 1, -1), "seed must be >= 0"),
        (("val", 64, 1, 0, 0), "most_digits must be >= 1, got 0"),
        (("val", 64, 1, 0, 5, (0.6, 0.5)), "sides must rise from >= 0.1 to <= 1, got"),
        (("val", 64, 1, 0, 5, (0.3, 0.5), 1.1), "overlap must be from 0 to 1, got 1.1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DigitScenes(*arguments)
