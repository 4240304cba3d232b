"""What the loop gets: every held-out image once, an order that is a function of seed and epoch, normalised pixels."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from PIL import Image

from tests.training import tiny_config, write_image_folder
from vim.data.loaders import build_loaders
from vim.data.preprocessing import Preprocessing

CPU = torch.device("cpu")
NO_CROP = {"augment__scale": (1.0, 1.0), "augment__ratio": (1.0, 1.0)}


def order(loaders, epoch):
    """The training images of an epoch, each by a number that tells it from the others."""
    loaders.set_epoch(epoch)
    images = torch.cat([images for images, _ in loaders.train]).double().flatten(1)
    return (images @ torch.arange(images.shape[1]).double()).round()


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reads_every_held_out_image_once_in_order(workers):
    loaders = build_loaders(tiny_config(data__dataset="digits", eval_batch_size=64, data__workers=workers), CPU)
    labels = torch.cat([labels for _, labels in loaders.val])
    assert labels.equal(loaders.sets.val.labels)  # 360 images do not divide into batches of 64
    images = torch.cat([images for images, _ in loaders.val])
    expected = (loaders.sets.val.images / 255 - 0.309) / 0.35
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)


def test_an_epoch_shows_whole_batches_of_different_images_in_an_order_of_its_own():
    loaders = build_loaders(tiny_config(data__synthetic_images=50, **NO_CROP), CPU)
    first, second = order(loaders, 0), order(loaders, 1)
    assert len(first) == 48  # the last batch would not be whole
    assert first.unique().numel() == 48
    assert not first.equal(second)


def test_the_order_depends_on_the_seed_and_the_epoch_and_on_nothing_else():
    digits = {"data__dataset": "digits", "batch_size": 479, "micro_batch_size": 479, **NO_CROP}
    expected = order(build_loaders(tiny_config(**digits), CPU), 5)
    torch.manual_seed(99)
    again = build_loaders(tiny_config(**digits), CPU)
    order(again, 2)
    assert order(again, 5).equal(expected)
    other = order(build_loaders(tiny_config(seed=1, **digits), CPU), 5)
    assert not other.equal(expected)
    assert other.sort().values.equal(expected.sort().values)  # the same images, all of them


def test_repeated_augmentation_works_in_a_single_process():
    config = tiny_config(data__synthetic_images=48, augment__repeats=3, **NO_CROP)
    loaders = build_loaders(config, CPU)
    seen = Counter(order(loaders, 0).tolist())
    assert sorted(seen.values()) == [3] * 16  # a third of the images, three times each
    assert set(order(loaders, 1).tolist()) != set(seen)


def test_files_are_augmented_when_trained_on_and_preprocessed_when_held_out(tmp_path):
    write_image_folder(tmp_path, ["ant", "bee"], {"train": 6, "val": 3})
    config = tiny_config(
        data__dataset="folder",
        data__path=str(tmp_path),
        model__in_chans=3,
        data__mean=(0.4, 0.5, 0.6),
        data__std=(0.2,),
        data__crop_pct=0.8,
        batch_size=4,
        micro_batch_size=4,
        augment__auto_augment="rand-m9-mstd0.5-inc1",
        augment__hflip=0.5,
        augment__erase_prob=0.25,
    )
    loaders = build_loaders(config, CPU)
    images, labels = next(iter(loaders.val))
    transform = Preprocessing.from_config(config).transform()
    files = [path for path, _ in loaders.sets.val.reader.samples][:4]
    expected = torch.stack([transform(Image.open(path)) for path in files])
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=1e-4)
    assert labels.tolist() == [0, 0, 0, 1]
    first, second = (next(iter(loaders.train))[0] for _ in range(2))
    assert first.shape == (4, 3, 16, 16)
    assert not first.equal(second)  # the same images in the same order, augmented anew


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "v0r", "original"])
def test_every_operation_of_a_policy_runs_at_every_strength(tmp_path, policy):
    """Pillow 13 refuses to keep no bit of an image, which the strongest posterize of RandAugment asks for."""
    write_image_folder(tmp_path, ["ant", "bee"], {"train": 2, "val": 2})
    config = tiny_config(
        data__dataset="folder",
        data__path=str(tmp_path),
        model__in_chans=3,
        batch_size=4,
        micro_batch_size=4,
        augment__auto_augment=policy,
    )
    transform = build_loaders(config, CPU).sets.train.transform.transforms[1]
    image = Image.effect_noise((20, 20), 90).convert("RGB")
    names = set()
    for step in transform.transforms:
        operations = [*getattr(step, "ops", ()), *(op for policy in getattr(step, "policy", ()) for op in policy)]
        for operation in operations:
            names.add(operation.name)
            operation.prob, operation.magnitude_std = 1.0, 0.0
            for operation.magnitude in (0, 5, 10):
                assert operation(image).size == image.size
            if operation.name == "PosterizeIncreasing":
                assert operation(image).getextrema() == ((0, 0), (0, 0), (0, 0))
    assert len(names) > 5


def test_a_policy_is_refused_for_images_with_transparency(tmp_path):
    write_image_folder(tmp_path, ["ant", "bee"], {"train": 8, "val": 2})
    config = tiny_config(
        data__dataset="folder", data__path=str(tmp_path), model__in_chans=4, augment__auto_augment="rand-m9"
    )
    with pytest.raises(ValueError, match=r"augment.auto_augment must be null for model.in_chans = 4, got 'rand-m9'"):
        build_loaders(config, CPU)


def test_an_erased_rectangle_appears_in_training_images_only():
    config = tiny_config(augment__erase_prob=1.0, augment__erase_mode="const", model__img_size=32, **NO_CROP)
    loaders = build_loaders(config, CPU)
    train, val = next(iter(loaders.train))[0], next(iter(loaders.val))[0]
    assert ((train == 0).float().mean(dim=(1, 2, 3)) > 0.01).all()
    assert (val == 0).float().mean() < 0.01


def test_more_images_in_a_step_than_an_epoch_shows_are_refused():
    with pytest.raises(ValueError, match="batch_size must be <= the 48 training images that an epoch shows, got 64"):
        build_loaders(tiny_config(batch_size=64), CPU)


def test_grey_files_are_read_in_the_number_of_channels_of_the_model(tmp_path):
    write_image_folder(tmp_path, ["ant", "bee"], {"train": 2, "val": 2})
    changes = {"data__dataset": "folder", "data__path": str(tmp_path), "batch_size": 4, "micro_batch_size": 4}
    loaders = build_loaders(tiny_config(**changes), CPU)
    assert next(iter(loaders.train))[0].shape == (4, 1, 16, 16)
    with pytest.raises(ValueError, match=r"model.in_chans must be one of \[1, 3, 4\] to read image files, got 2"):
        build_loaders(tiny_config(model__in_chans=2, **changes), CPU)
