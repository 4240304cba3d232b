"""The augmentation moves an image and its mask together."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_runs import TINY_SEGMENTER, tiny_config
from vim.data.joint_transforms import JointTransform, largest_share, resized_shape
from vim.data.masks import NO_CLASS


def transform(**changes):
    settings = {"segmentation__scale": (1.0, 1.0), "segmentation__category_ratio": 1.0, **changes}
    return JointTransform(tiny_config(**{**TINY_SEGMENTER, "model__img_size": 32, **settings}))


def pair(shape=(50, 70)):
    """An image whose pixels are its mask, in every channel."""
    mask = torch.randint(0, 200, (shape[0] // 10, shape[1] // 10), dtype=torch.uint8)
    mask = mask.repeat_interleave(10, 0).repeat_interleave(10, 1)
    return mask.expand(3, -1, -1).clone(), mask


@pytest.mark.parametrize("flips", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_a_crop_shows_the_same_pixels_in_both(flips):
    torch.manual_seed(0)
    cut = transform(augment__hflip=flips[0], augment__vflip=flips[1])
    image, mask = pair()
    for _ in range(5):
        cropped, labels = cut(image, mask)
        assert cropped.shape == (3, 32, 32)
        assert (cropped == labels).all()


def test_a_resized_mask_has_only_labels_that_were_there():
    torch.manual_seed(0)
    image, mask = pair()
    sizes = set()
    for _ in range(8):
        cropped, labels = transform(segmentation__scale=(0.5, 2.0))(image, mask)
        found = set(labels.unique().tolist())
        assert found <= set(mask.unique().tolist()) | {NO_CLASS}
        sizes.add(len(found))
        assert (cropped.float() - labels).abs().median() < 3  # the same place, apart from blurred edges and padding
    assert len(sizes) > 1


def test_a_small_image_is_padded_with_its_mean_and_pixels_without_a_class():
    image, mask = pair((20, 30))
    cropped, labels = transform()(image, mask)
    assert (labels[:20, :30] == mask).all()
    assert (labels[20:] == NO_CLASS).all()
    assert (labels[:, 30:] == NO_CLASS).all()
    assert cropped[0, -1, -1] == round(255 * 0.4)


def test_a_crop_that_one_class_fills_is_drawn_again():
    mask = torch.zeros(64, 200, dtype=torch.uint8)
    mask[:, 170:] = 1
    image = mask.expand(3, -1, -1).clone()

    def share(ratio):
        torch.manual_seed(0)
        crops = [transform(segmentation__category_ratio=ratio)(image, mask)[1] for _ in range(20)]
        return sum(largest_share(crop) < 0.9 for crop in crops)

    assert share(0.9) > share(1.0) + 5


def test_colours_change_and_the_mask_does_not():
    torch.manual_seed(0)
    image, mask = pair((30, 30))
    results = [transform(segmentation__photometric=True)(image, mask) for _ in range(6)]
    assert any(not torch.equal(result[:, :30, :30], image) for result, _ in results)
    assert all(torch.equal(labels[:30, :30], mask) for _, labels in results)


def test_sizes():
    assert resized_shape((100, 300), 50) == (50, 150)
    assert resized_shape((300, 100), 50, 2.0) == (300, 100)
    assert resized_shape((30, 20), None, 0.5) == (15, 10)
    assert largest_share(torch.tensor([[0, 0, 1, NO_CLASS]])) == pytest.approx(2 / 3)
    assert largest_share(torch.tensor([[NO_CLASS]])) == 1
