"""Images in memory: whole batches, each image with a crop and flip of its own."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vim.data.order import Place
from vim.data.tensors import RandomCropFlip, TensorImages

WHOLE = RandomCropFlip(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, vflip=0.0, interpolation="bilinear")


def augmented(crop, batch):
    return crop(batch, torch.rand(len(batch), crop.draws_per_image))


def images(batch=8, height=12, width=16):
    return torch.randint(0, 256, (batch, 2, height, width), dtype=torch.uint8)


def ramp(batch, size):
    return (torch.arange(size).float() * 4).expand(batch, 1, size, size)


def test_a_crop_of_the_whole_changes_nothing():
    batch = images(height=12, width=12)
    torch.testing.assert_close(augmented(WHOLE, batch), batch.float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("flip", "axis"), [("hflip", 3), ("vflip", 2)])
def test_a_certain_flip_reverses_its_axis(flip, axis):
    batch = images(height=12, width=12)
    flipped = augmented(dataclasses.replace(WHOLE, **{flip: 1.0}), batch)
    torch.testing.assert_close(flipped, batch.float().flip(axis), atol=1e-3, rtol=0)


def test_a_flip_falls_on_about_its_share_of_the_images():
    torch.manual_seed(0)
    flipped = augmented(dataclasses.replace(WHOLE, hflip=0.25), ramp(1000, 8))
    assert 0.2 < (flipped[:, 0, 0, 0] > 14).float().mean() < 0.3


def test_a_crop_of_a_quarter_of_the_area_halves_each_side_at_a_random_place():
    torch.manual_seed(0)
    crop = dataclasses.replace(WHOLE, scale=(0.25, 0.25))
    cropped = augmented(crop, ramp(64, 32))[:, 0, 16]  # (batch, width): across a ramp of 4 a pixel
    slopes = cropped[:, 2:-2].diff(dim=1)
    torch.testing.assert_close(slopes, torch.full_like(slopes, 2.0), atol=1e-2, rtol=0)
    starts = cropped[:, 2]
    assert starts.min() < 20
    assert starts.max() > 50  # of at most 64 + 4
    assert starts.unique().numel() > 50


def test_the_aspect_ratio_of_a_crop_is_its_width_over_its_height():
    crop = dataclasses.replace(WHOLE, scale=(0.25, 0.25), ratio=(2.0, 2.0))
    across = ramp(4, 32)
    width_slope = augmented(crop, across)[:, 0, 16, 4:-4].diff(dim=1)
    height_slope = augmented(crop, across.transpose(2, 3))[:, 0, 4:-4, 16].diff(dim=1)
    torch.testing.assert_close(width_slope / height_slope, torch.full_like(width_slope, 2.0), atol=1e-2, rtol=0)


def test_a_crop_of_a_wide_image_keeps_the_ratio_in_pixels():
    crop = dataclasses.replace(WHOLE, scale=(0.25, 0.25))
    wide = (torch.arange(64).float() * 4).expand(4, 1, 32, 64)
    high = (torch.arange(32).float() * 4)[:, None].expand(4, 1, 32, 64)
    # A square of 22.6 pixels stretched to 64 x 32: 0.35 source pixels a step across, 0.71 down.
    assert augmented(crop, wide)[:, 0, 16, 4:-4].diff().mean().item() == pytest.approx(4 * 22.63 / 64, abs=0.02)
    assert augmented(crop, high)[:, 0, 4:-4, 32].diff().mean().item() == pytest.approx(4 * 22.63 / 32, abs=0.02)


def test_every_image_of_a_batch_is_cropped_differently():
    crop = dataclasses.replace(WHOLE, scale=(0.3, 0.8), ratio=(0.7, 1.4))
    same = images(batch=1).expand(6, -1, -1, -1)
    cropped = augmented(crop, same)
    assert cropped.shape == same.shape
    assert all(not torch.equal(cropped[0], cropped[i]) for i in range(1, 6))
    assert cropped.min() >= 0
    assert cropped.max() <= 255


def test_an_interpolation_that_works_on_files_only_is_refused():
    with pytest.raises(ValueError, match=r"augment.interpolation must be 'nearest', .* got 'lanczos'"):
        dataclasses.replace(WHOLE, interpolation="lanczos")


def test_a_batch_is_read_at_once():
    dataset = TensorImages(images(5), torch.arange(5))
    batch, labels, unreadable = dataset.__getitems__([Place(0, 0, 3), Place(0, 1, 1)])
    assert torch.equal(batch, dataset.images[[3, 1]])
    assert labels.tolist() == [3, 1]
    assert unreadable == []
    assert len(dataset) == 5


def test_the_crop_of_an_image_is_a_function_of_the_seed_the_epoch_and_the_position():
    crop = dataclasses.replace(WHOLE, scale=(0.3, 0.8))
    dataset = TensorImages(images(1).expand(6, -1, -1, -1), torch.arange(6), augment=crop, seed=3)

    def read(epoch, *positions):
        return dataset.__getitems__([Place(epoch, position, 0) for position in positions])[0]

    whole = read(2, *range(6))
    other = read(1, 4)[0]
    torch.manual_seed(99)
    assert torch.equal(read(2, 4), whole[4:5])  # in another batch, after another epoch
    assert not torch.equal(whole[4], other)
    reseeded = TensorImages(dataset.images, dataset.labels, augment=crop, seed=4)
    assert not torch.equal(reseeded.__getitems__([Place(2, 4, 0)])[0], whole[4:5])


def test_images_and_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"images must be uint8 .* got torch.float32"):
        TensorImages(images().float(), torch.arange(8))
    with pytest.raises(ValueError, match=r"labels must be \(images,\) = \(8,\), got \(7,\)"):
        TensorImages(images(8), torch.arange(7))
