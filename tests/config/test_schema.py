"""Settings are checked where they are made, and resolve to what the loop uses."""

from __future__ import annotations

import dataclasses
import math

import pytest

from tests.tiny_runs import change
from vim.config.schema import DataConfig, TrainConfig


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("epochs", 0),
        ("batch_size", -8),
        ("micro_batch_size", 0),
        ("eval_batch_size", 0),
        ("precision", "fp8"),
        ("ema_decay", 1.0),
        ("seed", -1),
        ("recipe", "a/b"),
        ("recipe", ""),
        ("model__img_size", 0),
        ("model__img_size", (32, -1)),
        ("model__in_chans", 0),
        ("model__num_classes", 0),
        ("model__drop_rate", 1.5),
        ("model__drop_path_rate", -0.1),
        ("data__extensions", ()),
        ("data__extensions", ("jpg",)),
        ("data__bits", 7),
        ("data__bits", 17),
        ("data__crop_pct", 0.0),
        ("data__crop_pct", 1.1),
        ("data__interpolation", "cubic"),
        ("data__mean", ()),
        ("data__std", (0.0,)),
        ("data__workers", -1),
        ("data__synthetic_images", 3),
        ("augment__scale", (0.0, 1.0)),
        ("augment__scale", (0.5, 1.5)),
        ("augment__scale", (1.0, 0.5)),
        ("augment__ratio", (2.0, 1.0)),
        ("augment__hflip", 1.1),
        ("augment__erase_prob", -0.5),
        ("augment__erase_mode", "noise"),
        ("augment__erase_count", 0),
        ("augment__mixup", -0.1),
        ("augment__mix_mode", "image"),
        ("augment__repeats", -1),
        ("loss__label_smoothing", 1.0),
        ("optim__lr", 0.0),
        ("optim__lr", math.nan),
        ("optim__lr", math.inf),
        ("optim__weight_decay", math.inf),
        ("optim__eps", math.inf),
        ("optim__clip_grad", math.inf),
        ("schedule__warmup_lr", math.inf),
        ("schedule__min_lr", math.inf),
        ("augment__mixup", math.inf),
        ("save__minutes", math.inf),
        ("distill__temperature", math.inf),
        ("augment__ratio", (0.5, math.inf)),
        ("data__mean", (math.inf,)),
        ("data__mean", (math.nan,)),
        ("data__std", (math.inf,)),
        ("data__std", (0.5, math.nan)),
        ("optim__lr_batch_size", 0),
        ("optim__weight_decay", -1.0),
        ("optim__betas", (0.9, 1.0)),
        ("optim__clip_grad", 0.0),
        ("optim__clip_mode", "l2"),
        ("schedule__name", "linear"),
        ("schedule__unit", "batch"),
        ("schedule__warmup_lr", -1e-6),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_name_of_the_setting_and_the_value(setting, value):
    with pytest.raises(ValueError) as caught:
        change(TrainConfig(), **{setting: value})
    message = str(caught.value)
    assert message.startswith(setting.replace("__", ".") + " must be ")
    assert repr(value) in message


def test_a_value_of_a_wrong_type_is_refused_with_the_name_of_the_setting():
    with pytest.raises(TypeError, match=r"optim\.lr must be > 0, got 'fast'"):
        change(TrainConfig(), optim__lr="fast")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_size": 64, "micro_batch_size": 48},
            "batch_size must be a multiple of micro_batch_size = 48, got 64: change either",
        ),
        (
            {"batch_size": 15, "micro_batch_size": 5, "augment__mixup": 0.8},
            "micro_batch_size must be even when augment.mixup or augment.cutmix is on, since they pair images, got 5",
        ),
        (
            {"epochs": 3, "schedule__warmup_epochs": 4},
            "schedule.warmup_epochs must be <= epochs = 3, got 4: .*_epochs 0",
        ),
        (
            {"schedule__unit": "epoch", "schedule__warmup_steps": 9},
            "schedule.warmup_steps must be null when schedule.unit is 'epoch', got 9",
        ),
        ({"max_steps": 5, "schedule__warmup_steps": 6}, "schedule.warmup_steps must be <= max_steps = 5, got 6"),
        ({"max_steps": 5, "schedule__unit": "epoch"}, "schedule.unit must be 'step' when max_steps is 5, got 'epoch'"),
        (
            {"max_steps": 5, "progressive__start_size": 16},
            "progressive.epochs must be set when max_steps is 5, got None",
        ),
        ({"schedule__unit": "step", "schedule__lag_epochs": 1}, "schedule.lag_epochs must be 0 .* got 1"),
        ({"data__mean": (0.5, 0.5)}, r"data.mean must be one number .* model.in_chans = 1 .* got \(0.5, 0.5\)"),
        ({"data__dataset": "folder"}, "data.path must name the image folder .* got None"),
        ({"data__path": "/images"}, "data.path must be null when data.dataset is 'digits'.* got '/images'"),
        ({"model__args": {"in_chans": 3}}, "model.args must not hold 'in_chans': set model.in_chans instead, got 3"),
        (
            {"model__args": {"checkpoint_path": "a.pth"}},
            "model.args must not hold 'checkpoint_path': set model.checkpoint instead, got 'a.pth'",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        change(TrainConfig(), **changes)


def test_settings_cannot_be_changed_in_place():
    config = TrainConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.epochs = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        DataConfig("digits")  # type: ignore[misc]


def test_the_learning_rate_scales_with_the_batch_only_where_a_base_is_given():
    assert change(TrainConfig(), optim__lr=1e-3, batch_size=128).peak_lr == 1e-3
    scaled = change(TrainConfig(), optim__lr=5e-4, optim__lr_batch_size=512, batch_size=1024, micro_batch_size=128)
    assert scaled.peak_lr == pytest.approx(1e-3)
    assert scaled.split_batch(1).accumulation_steps == 8


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "expected"),
    [
        (1024, 128, 1, (128, 8)),
        (1024, 128, 8, (128, 1)),
        (1024, 128, 16, (64, 1)),
        (1024, 128, 3 * 4 + 4, (64, 1)),
        (96, 32, 2, (24, 2)),
        (64, 64, 2, (32, 1)),
        (40, 64, 1, (40, 1)),
        (20, 32, 2, (10, 1)),
    ],
)
def test_the_batch_of_a_step_stays_what_it_is_on_any_number_of_processes(batch, micro, processes, expected):
    config = change(TrainConfig(), batch_size=batch, micro_batch_size=micro)
    split = config.split_batch(processes)
    assert (split.micro_batch_size, split.accumulation_steps) == expected
    assert processes * split.micro_batch_size * split.accumulation_steps == batch


def test_processes_that_cannot_share_a_batch_are_refused():
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 processes that share it, got 64"):
        TrainConfig().split_batch(3)
    mixing = change(TrainConfig(), augment__mixup=0.8, batch_size=12, micro_batch_size=12)
    assert mixing.split_batch(2).micro_batch_size == 6
    assert change(mixing, micro_batch_size=4).split_batch(2).micro_batch_size == 2  # pairs are mixed: 3 is odd
    with pytest.raises(ValueError, match=r"batch_size must be a multiple of twice the 4 processes .* got 12"):
        mixing.split_batch(4)


def test_an_image_size_is_a_side_or_a_height_and_a_width():
    assert change(TrainConfig(), model__img_size=24).model.image_shape == (24, 24)
    assert change(TrainConfig(), model__img_size=(16, 24)).model.image_shape == (16, 24)


def test_mixing_is_on_only_with_an_alpha_and_a_probability():
    assert not TrainConfig().augment.mixes
    assert change(TrainConfig(), augment__cutmix=1.0).augment.mixes
    assert not change(TrainConfig(), augment__cutmix=1.0, augment__mix_prob=0.0).augment.mixes
