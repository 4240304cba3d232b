"""The recipes in configs/: complete, explained, and what they say they are."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml

from vim.config.load import config_from_dict, parse_command_line, setting_names
from vim.config.schema import IMAGE_EXTENSIONS, TaskName, TrainConfig
from vim.config.segmentation import SegmentationConfig
from vim.models.build import build_model
from vim.training.optim import Schedule

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))

# hustvl/Vim, the defaults of vim/main.py that its scripts share, by our names; None where the original has no such
# setting and ours must be off or left to PyTorch. Settings of the machine are not part of the recipe.
DEFAULTS = {
    "task": "classification",
    "precision": "float32",
    "ema_decay": 0.99996,
    "best_by": "raw",
    "seed": 0,
    "model.img_size": 224,
    "model.in_chans": 3,
    "model.num_classes": None,
    "model.drop_rate": 0.0,
    "model.pretrained": False,
    "model.checkpoint": None,
    "model.pretrained_weights": "best",
    "model.pretrained_resampling": "exact",
    "model.args": {},
    "max_steps": None,
    "segmentation": SegmentationConfig(),
    "optim.layer_decay": None,
    "optim.trainable": ("*",),
    "progressive.start_size": None,
    "distill.teacher": None,
    "data.dataset": "folder",
    "data.download": False,
    "data.extensions": IMAGE_EXTENSIONS,  # the original's, torchvision's, and more of a kind that ImageNet lacks
    "data.bits": 16,
    "data.input_key": None,
    "data.target_key": None,
    "data.train_split": "train",
    "data.val_split": "val",
    "data.crop_pct": 0.875,
    "data.interpolation": "bicubic",
    "data.mean": (0.485, 0.456, 0.406),
    "data.std": (0.229, 0.224, 0.225),
    "data.workers": 10,
    "data.pin_memory": True,
    "augment.scale": (0.08, 1.0),
    "augment.ratio": (3 / 4, 4 / 3),
    "augment.interpolation": "bicubic",
    "augment.hflip": 0.5,
    "augment.vflip": 0.0,
    "augment.color_jitter": 0.3,
    "augment.auto_augment": "rand-m9-mstd0.5-inc1",
    "augment.repeats": 3,
    "augment.repeats_rounding": 256,
    "augment.erase_prob": 0.25,
    "augment.erase_mode": "pixel",
    "augment.erase_count": 1,
    "augment.mixup": 0.8,
    "augment.cutmix": 1.0,
    "augment.mix_prob": 1.0,
    "augment.mix_switch_prob": 0.5,
    "augment.mix_mode": "batch",
    "loss.label_smoothing": 0.1,
    "optim.name": "adamw",
    "optim.lr_batch_size": 512,
    "optim.no_weight_decay": (),
    "optim.eps": 1e-8,
    "optim.betas": None,
    "optim.momentum": 0.9,
    "optim.clip_grad": None,
    "optim.clip_mode": "norm",
    "schedule.name": "cosine",
    "schedule.unit": "epoch",
    "schedule.warmup_epochs": 5,
    "schedule.warmup_lr": 1e-6,
    "schedule.min_lr": 1e-5,
    "schedule.lag_epochs": 1,
    "schedule.warmup_steps": None,
}
OF_THE_MACHINE = {
    *("micro_batch_size", "eval_batch_size", "max_skipped_steps", "device", "data.path", "data.synthetic_images"),
    *(
        "compile",
        "model.grad_checkpointing",
        "optim.unfreeze_after",
        "optim.layer_decay_of",
        "schedule.power",
        "schedule.milestones",
        "progressive.epochs",
        "progressive.multiple",
    ),
    *("distill.teacher_model", "distill.mode", "distill.weight", "distill.temperature"),
    *("save.steps", "save.minutes", "log.trackers", "log.steps", "log.report"),
}
FROM_SCRATCH = {"epochs": 300}
FINE_TUNING = {
    "epochs": 30,
    "batch_size": 8 * 128,
    "model.drop_path_rate": 0.0,
    "model.pretrained_weights": "raw",
    "model.pretrained_resampling": "reference",
    "optim.lr": 5e-6,
    "optim.weight_decay": 1e-8,
    "schedule.warmup_lr": 1e-5,
    "schedule.min_lr": 1e-5,
}
# What each script changes (pt-vim-t.sh, pt-vim-s.sh, ft-vim-t.sh, ft-vim-s.sh); the last one has no script.
ORIGINAL = {
    "vim_tiny_in1k": FROM_SCRATCH
    | {
        "batch_size": 8 * 128,
        "model.name": "vim_tiny_patch16_224",
        "model.drop_path_rate": 0.0,
        "optim.lr": 5e-4,
        "optim.weight_decay": 0.1,
    },
    "vim_small_in1k": FROM_SCRATCH
    | {
        "batch_size": 8 * 64,
        "model.name": "vim_small_patch16_224",
        "model.drop_path_rate": 0.05,
        "optim.lr": 1e-3,
        "optim.weight_decay": 0.05,
    },
    "vim_tiny_in1k_ft_stride8": FINE_TUNING
    | {"model.name": "vim_tiny_patch16_stride8_224", "model.checkpoint": "vim_t_midclstok_76p1acc.pth"},
    "vim_small_in1k_ft_stride8": FINE_TUNING
    | {"model.name": "vim_small_patch16_stride8_224", "model.checkpoint": "vim_s_midclstok_80p5acc.pth"},
    "vim_base_in1k": FROM_SCRATCH
    | {
        "batch_size": 1024,
        "model.name": "vim_base_patch16_224",
        "model.drop_path_rate": 0.1,
        "optim.lr": 5e-4,
        "optim.weight_decay": 0.05,
    },
}
PEAK_LR = dict.fromkeys(ORIGINAL, 1e-3) | dict.fromkeys([name for name in ORIGINAL if "_ft_" in name], 1e-5)


def flat(data, prefix=""):
    for name, value in data.items():
        if isinstance(value, dict) and f"{prefix}{name}" != "model.args":
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def resolve(recipe, *more):
    return parse_command_line(["--config", str(CONFIGS / f"{recipe}.yaml"), *more]).config


def setting(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return config


def names_for(task):
    """Return the settings of a task: a recipe leaves the groups of other tasks out."""
    others = {f"{name}." for name in get_args(TaskName) if name != task}
    return [name for name in setting_names() if not name.startswith(tuple(others))]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_sets_everything_and_carries_its_own_name(path):
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    own = set(names_for(data["task"]))
    assert [name for name, _ in flat(data) if name in own] == names_for(data["task"])
    assert {name for name, _ in flat(data)} <= set(setting_names())
    assert data["recipe"] == path.stem


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_begins_with_its_command_source_hardware_time_and_expected_accuracy(path):
    head = path.read_text(encoding="utf-8").split("\nrecipe:")[0]
    assert all(line.startswith("#") or not line for line in head.splitlines())
    for word in ("Command", "Source", "Hardware", "Time", "Expected"):
        assert f"\n# {word} " in head, f"{path.name} does not say: {word}"


def test_the_digits_recipe_is_what_training_without_arguments_does():
    assert resolve("digits") == TrainConfig()


@pytest.mark.parametrize("recipe", ORIGINAL)
def test_every_setting_of_an_imagenet_recipe_is_the_original_one(recipe):
    config = resolve(recipe, "--data.path", "IMAGENET")
    original = DEFAULTS | {"recipe": recipe} | ORIGINAL[recipe]
    assert set(original) - {"segmentation"} | OF_THE_MACHINE == set(names_for("classification"))
    assert {name: setting(config, name) for name in original} == original
    assert config.peak_lr == pytest.approx(PEAK_LR[recipe])
    assert config.data.path == "IMAGENET"


@pytest.mark.parametrize("recipe", [name for name in ORIGINAL if "_ft_" in name])
def test_the_rate_of_fine_tuning_is_constant(recipe):
    config = resolve(recipe, "--data.path", "IMAGENET")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.peak_lr)
    schedule = Schedule(optimizer, config, updates_per_epoch=3)
    rates = [schedule.set(epoch, 3 * epoch + step) for epoch in range(30) for step in range(3)]
    assert rates == pytest.approx([1e-5] * 90)


@pytest.mark.parametrize("recipe", [*ORIGINAL, "finetune_folder"])
def test_a_recipe_for_a_folder_asks_for_the_images(recipe):
    with pytest.raises(ValueError, match=r"data.path must name the image folder .* 'folder', got None"):
        resolve(recipe)


# The original's seg/: by script, learning rate, weight decay, layer decay and what the pyramid reads.
ADE20K = {"tiny": (2e-4, 0.1, 0.92, "mixer"), "small": (1e-4, 0.05, 0.95, "sum")}


@pytest.mark.parametrize("size", ADE20K)
def test_an_ade20k_recipe_is_the_script_of_the_original(size):
    config = resolve(f"vim_{size}_ade20k", "--data.path", "ADE20K")
    own, optim, schedule = config.segmentation, config.optim, config.schedule
    assert (optim.lr, optim.weight_decay, optim.layer_decay, own.tap) == ADE20K[size]
    assert (optim.layer_decay_of, optim.lr_batch_size, optim.clip_grad) == ("stem", None, None)
    assert (config.max_steps, config.batch_size, config.split_batch(4).micro_batch_size) == (60_000, 32, 8)
    assert (schedule.name, schedule.power, schedule.warmup_steps, schedule.min_lr) == ("poly", 1.0, 1500, 0.0)
    assert (own.blocks, own.norm, own.channels, own.aux_channels, own.aux_weight) == (
        *((5, 11, 17, 23), "batch", None, 256, 0.4),
    )
    assert (config.model.img_size, own.short_side, own.stride, own.scale) == (512, 512, 341, (0.5, 2.0))
    assert (own.category_ratio, own.photometric, own.dropout, config.augment.hflip) == (0.75, True, 0.1, 0.5)
    assert config.loss.label_smoothing == 0


@pytest.mark.parametrize("recipe", ["vim_tiny_ade20k", "vim_small_ade20k", "finetune_segmentation"])
def test_a_recipe_for_masks_asks_for_the_images(recipe):
    with pytest.raises(ValueError, match=r"data.path must name the image folder .* got None"):
        resolve(recipe)


def test_the_base_recipe_says_that_it_is_not_the_authors():
    assert "NOT PUBLISHED BY THE AUTHORS" in (CONFIGS / "vim_base_in1k.yaml").read_text(encoding="utf-8")


def test_fine_tuning_on_a_folder_is_sound_where_the_original_is_not():
    config = resolve("finetune_folder", "--data.path", "IMAGES", "--model.checkpoint", "best.safetensors")
    assert (config.model.pretrained, config.model.checkpoint) == (True, "best.safetensors")
    assert config.model.pretrained_resampling == "exact"
    assert config.optim.no_weight_decay == ("*.A_log", "*.A_b_log")
    assert (config.schedule.lag_epochs, config.augment.repeats_rounding) == (0, None)


def test_the_models_of_the_recipes_are_built_with_their_settings():
    for recipe in ("fashion_mnist", "digits"):
        config = resolve(recipe)
        model = build_model(config.model, 10)
        assert (model.depth, model.embed_dim) == (config.model.args["depth"], config.model.args["embed_dim"])


def test_a_recipe_builds_from_a_plain_dict_without_the_command_line():
    data = yaml.safe_load((CONFIGS / "digits.yaml").read_text(encoding="utf-8"))
    assert config_from_dict(data) == TrainConfig()
