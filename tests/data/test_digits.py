"""The embedded digits: a fixed split, stratified, without an image on both sides."""

from __future__ import annotations

import hashlib

import pytest
import torch

from vim.data.digits import CLASS_NAMES, load_digits

# Of the held-out labels in order; it changes if scikit-learn's data or its way to split does.
HELD_OUT_LABELS = "70ee2850bb25b543"


@pytest.fixture(scope="module")
def digits():
    return load_digits((32, 32), 1)


def test_the_split_is_fixed_and_stratified(digits):
    train, held_out = digits
    assert (len(train), len(held_out)) == (1437, 360)
    labels = held_out.labels
    assert hashlib.sha256(bytes(labels.tolist())).hexdigest()[:16] == HELD_OUT_LABELS
    for label in range(10):
        assert abs((labels == label).sum() / 360 - (train.labels == label).sum() / 1437) < 0.003
    again = load_digits((32, 32), 1)[1]
    assert torch.equal(again.images, held_out.images)


def test_no_image_is_on_both_sides(digits):
    train, held_out = ({image.numpy().tobytes() for image in part.images} for part in digits)
    assert not train & held_out


@pytest.mark.parametrize(("shape", "in_chans"), [((8, 8), 1), ((32, 32), 3), ((12, 20), 1)])
def test_images_come_in_the_size_and_with_the_channels_asked_for(shape, in_chans):
    train, held_out = load_digits(shape, in_chans)
    assert train.images.shape == (1437, in_chans, *shape)
    assert held_out.images.shape == (360, in_chans, *shape)
    assert train.images.dtype == torch.uint8
    assert train.images.min() == 0
    assert train.images.max() == 255
    assert all(torch.equal(train.images[:, 0], train.images[:, i]) for i in range(in_chans))


def test_classes_are_named_after_their_digit(digits):
    assert [CLASS_NAMES[label] for label in range(10)] == [str(digit) for digit in range(10)]
    zeros = digits[0].images[digits[0].labels == 0].float()  # a zero is dark in its middle, a one is not
    ones = digits[0].images[digits[0].labels == 1].float()
    assert zeros[:, 0, 14:18, 14:18].mean() < 60 < 120 < ones[:, 0, 14:18, 14:18].mean()
