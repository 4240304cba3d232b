"""Objects found as connected pixels, matched with the true ones."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from vim.data.mask_pairs import FilePairs, InstancePairs
from vim.inference.instance_matching import InstanceMatches, match_instances


def image(text):
    """Return a picture of digits as an array; a dot is 0."""
    return np.array([[0 if pixel == "." else int(pixel) for pixel in row] for row in text.split()])


def test_a_part_matches_an_object_above_half_of_their_union():
    true = image("1111.22. 1111.22. ......3. 77...... 77......")
    found = image("111..11. 111..1.. ........ 11...... 1......1")
    # 6 of 8 pixels, 3 of 4 and 3 of 4 are matches; object 3 is missed, and the last pixel is found wrongly
    matches = match_instances([(found, true)])
    assert matches == InstanceMatches(matched=3, true=4, found=4)
    assert matches.ap50 == pytest.approx(100 * 3 / 5)


def test_half_of_the_union_is_not_enough_and_touching_objects_are_one_part():
    assert match_instances([(image("11.."), image("1111"))]).matched == 0
    assert match_instances([(image("1111"), image("1122"))]) == InstanceMatches(matched=0, true=2, found=1)
    assert match_instances([(image("1111."), image("11122"))]) == InstanceMatches(matched=1, true=2, found=1)


def test_images_add_up_and_an_empty_one_counts_nothing():
    empty, full = np.zeros((2, 3), dtype=np.int64), np.ones((2, 3), dtype=np.int64)
    assert match_instances([(full, full), (empty, empty)]) == InstanceMatches(matched=1, true=1, found=1)
    assert math.isnan(match_instances([(empty, empty)]).ap50)


def test_folders_of_masks_do_not_tell_objects_apart(tmp_path):
    assert not isinstance(FilePairs(tmp_path, [], [], Counter()), InstancePairs)
