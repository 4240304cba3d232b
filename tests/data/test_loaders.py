"""What the loop gets: every held-out image once, an order that is a function of seed and epoch, normalised pixels."""

from __future__ import annotations

import random
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny_runs import change, tiny_config, write_image_folder
from vim.data.loaders import build_loaders
from vim.data.preprocessing import Preprocessing

CPU = torch.device("cpu")
NO_CROP = {"augment__scale": (1.0, 1.0), "augment__ratio": (1.0, 1.0)}


def order(loaders, epoch):
    """The training images of an epoch, each by a number that tells it from the others."""
    loaders.set_epoch(epoch)
    images = torch.cat([images for images, _ in loaders.train]).double().flatten(1)
    return (images @ torch.arange(images.shape[1]).double()).round()


def folder_config(root, **changes):
    """Settings for image files with every kind of augmentation."""
    write_image_folder(root, ["ant", "bee"], {"train": 12, "val": 5})
    settings = {
        "data__dataset": "folder",
        "data__path": str(root),
        "model__in_chans": 3,
        "batch_size": 8,
        "micro_batch_size": 4,
        "augment__auto_augment": "rand-m9-mstd0.5-inc1",
        "augment__hflip": 0.5,
        "augment__erase_prob": 0.5,
    }
    return tiny_config(**{**settings, **changes})


def batches(loaders, epoch, first_batch=0):
    loaders.set_epoch(epoch, first_batch)
    return [(images.clone(), labels) for images, labels in loaders.train]


def same(first, second):
    return len(first) == len(second) and all(
        a.equal(b) and m.equal(n) for (a, m), (b, n) in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reads_every_held_out_image_once_in_order(workers):
    loaders = build_loaders(tiny_config(data__dataset="digits", eval_batch_size=64, data__workers=workers), CPU)
    labels = torch.cat([labels for _, labels in loaders.val])
    assert labels.equal(loaders.sets.val.labels)  # 360 images do not divide into batches of 64
    images = torch.cat([images for images, _ in loaders.val])
    expected = (loaders.sets.val.images / 255 - 0.309) / 0.35
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)


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
    config = folder_config(tmp_path, data__mean=(0.4, 0.5, 0.6), data__std=(0.2,), data__crop_pct=0.8)
    loaders = build_loaders(config, CPU)
    transform = Preprocessing.from_config(config).transform()
    files = [loaders.sets.val.source.name(index) for index in range(10)]
    expected = torch.stack([transform(Image.open(path)) for path in files])
    torch.testing.assert_close(torch.cat([images for images, _ in loaders.val]), expected, atol=1e-4, rtol=1e-4)
    assert torch.cat([labels for _, labels in loaders.val]).tolist() == [0] * 5 + [1] * 5
    assert next(iter(loaders.train))[0].shape == (4, 3, 16, 16)


def test_augmentation_is_a_function_of_the_seed_and_the_place_in_the_run(tmp_path):
    config = folder_config(tmp_path)
    loaders = build_loaders(config, CPU)
    first, second = batches(loaders, 0), batches(loaders, 1)
    assert len(first) == len(loaders.train) == 6
    assert not same(first, second)
    random.seed(5)
    torch.manual_seed(5)
    np.random.seed(5)
    assert same(batches(loaders, 0), first)
    assert same(batches(loaders, 1, first_batch=3), second[3:])  # a run that was interrupted in the middle
    workers = build_loaders(change(config, data__workers=2), CPU)
    assert same(batches(workers, 1), second)
    assert same(batches(workers, 0, first_batch=5), first[5:])
    assert not same(batches(build_loaders(change(config, seed=1), CPU), 0), first)


@pytest.mark.parametrize("dataset", ["folder", "synthetic"])
def test_processes_share_the_micro_batches_that_one_process_accumulates(tmp_path, dataset):
    config = change(folder_config(tmp_path), augment__repeats=3, micro_batch_size=2)
    if dataset == "synthetic":
        config = change(config, data__dataset=dataset, data__path=None, augment__auto_augment=None)
    alone = batches(build_loaders(config, CPU), 3)
    shares = [batches(build_loaders(config, CPU, rank, world_size=2), 3) for rank in range(2)]
    assert same(alone, [batch for pair in zip(*shares, strict=True) for batch in pair])
    held_out = torch.cat([images for images, _ in build_loaders(config, CPU).val])
    parts = [torch.cat([images for images, _ in build_loaders(config, CPU, rank, 2).val]) for rank in range(2)]
    assert parts[0].equal(held_out[::2])
    assert parts[1].equal(held_out[1::2])


def test_loading_neither_reads_nor_changes_the_global_generators(tmp_path):
    loaders = build_loaders(folder_config(tmp_path), CPU)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    batches(loaders, 0)
    list(loaders.val)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_replaced_in_training_and_left_out_at_evaluation(tmp_path, caplog, workers):
    config = change(folder_config(tmp_path, data__workers=workers), augment__erase_prob=0.0)
    whole = batches(build_loaders(config, CPU), 0)
    for name in ("train/ant/3.jpg", "val/ant/0.jpg", "val/bee/1.jpg"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:500])
    (tmp_path / "val/bee/2.jpg").write_text("no image")
    loaders = build_loaders(config, CPU)
    shown = batches(loaders, 0)
    assert [len(labels) for _, labels in shown] == [4] * 6
    differing = (torch.cat([images for images, _ in shown]) != torch.cat([images for images, _ in whole])).flatten(1)
    assert differing.any(dim=1).sum() == 1  # every other image is what it was
    assert loaders.train_unreadable.take() == 1
    assert same(batches(loaders, 0), shown)
    assert loaders.train_unreadable.take() == 1
    labels = torch.cat([labels for _, labels in loaders.val])
    assert labels.tolist() == [0] * 4 + [1] * 3
    assert loaders.val_unreadable.take() == 3
    assert loaders.val_unreadable.take() == 0
    lines = sorted(record.getMessage() for record in caplog.records)
    assert len(lines) == 4  # each file once, however often it was tried
    assert lines[0].startswith(f"{tmp_path}/train/ant/3.jpg cannot be read and is replaced by another image: ")
    assert lines[3].startswith(
        f"{tmp_path}/val/bee/2.jpg cannot be read and is left out of the evaluation: cannot ident"
    )


def test_a_held_out_set_of_which_nothing_can_be_read_gives_no_batch(tmp_path):
    config = folder_config(tmp_path)
    for path in (tmp_path / "val").rglob("*.jpg"):
        path.write_bytes(b"")
    loaders = build_loaders(config, CPU)
    assert list(loaders.val) == []
    assert loaders.val_unreadable.take() == 10


def test_a_training_set_that_went_away_ends_the_run_and_says_why(tmp_path):
    config = folder_config(tmp_path)
    loaders = build_loaders(config, CPU)
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(RuntimeError, match=r"10 images in a row, .* the last was .*jpg: .*No such file"):
        next(iter(loaders.train))


def test_three_augment_is_the_three_of_deit_iii_with_colour_jitter(tmp_path):
    config = change(folder_config(tmp_path), augment__auto_augment="3a", augment__color_jitter=0.3)
    steps = build_loaders(config, CPU).sets.train.transform.transforms
    names = [
        operation.name
        for policy in next(step.policy for step in steps if hasattr(step, "policy"))
        for operation in policy
    ]
    assert names == ["Solarize", "Desaturate", "GaussianBlurRand"]
    assert any(type(step).__name__ == "ColorJitter" for step in steps)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "v0r", "original"])
def test_every_operation_of_a_policy_runs_at_every_strength(tmp_path, policy):
    """Pillow 13 refuses to keep no bit of an image, which the strongest posterize of RandAugment asks for."""
    transform = build_loaders(folder_config(tmp_path, augment__auto_augment=policy), CPU).sets.train.transform
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
    config = folder_config(tmp_path, model__in_chans=4, augment__auto_augment="rand-m9")
    with pytest.raises(ValueError, match=r"augment.auto_augment must be null for model.in_chans = 4, got 'rand-m9'"):
        build_loaders(config, CPU)


def test_an_erased_rectangle_appears_in_training_images_only():
    config = tiny_config(augment__erase_prob=1.0, augment__erase_mode="const", model__img_size=32, **NO_CROP)
    loaders = build_loaders(config, CPU)
    train, val = next(iter(loaders.train))[0], next(iter(loaders.val))[0]
    assert ((train == 0).float().mean(dim=(1, 2, 3)) > 0.01).all()
    assert (val == 0).float().mean() < 0.01


def test_grey_files_are_read_in_the_number_of_channels_of_the_model(tmp_path):
    write_image_folder(tmp_path, ["ant", "bee"], {"train": 2, "val": 2})
    changes = {"data__dataset": "folder", "data__path": str(tmp_path), "batch_size": 4, "micro_batch_size": 4}
    loaders = build_loaders(tiny_config(**changes), CPU)
    assert next(iter(loaders.train))[0].shape == (4, 1, 16, 16)
    with pytest.raises(ValueError, match=r"model.in_chans must be one of \[1, 3, 4\] to read image files, got 2"):
        build_loaders(tiny_config(model__in_chans=2, **changes), CPU)
