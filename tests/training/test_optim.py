"""Learning rate, weight decay, averaged weights and clipping against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.tiny_runs import TINY_MODEL, tiny_config
from vim.models.build import build_model
from vim.training.optim import Schedule, build_optimizer, clip_gradients, gradient_norm


def rates(config, updates_per_epoch=10):
    """The learning rate of the first step of every epoch, and of every step."""
    model = nn.Linear(2, 2)
    schedule = Schedule(build_optimizer(model, config), config, updates_per_epoch)
    steps = [(step // updates_per_epoch, step) for step in range(config.epochs * updates_per_epoch)]
    values = [schedule.set(epoch, step) for epoch, step in steps]
    return values[::updates_per_epoch], values


def original_schedule(epoch):
    """pt-vim-t of the original: the rate in an epoch, for a peak of 1e-3, 5 of 300 epochs of warm-up."""
    lagged = max(0, epoch - 1)
    if lagged < 5:
        return 1e-6 + lagged * (1e-3 - 1e-6) / 5
    return 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * lagged / 300))


def test_the_imagenet_schedule_is_the_original_one_with_its_lag():
    config = tiny_config(
        epochs=300,
        batch_size=1024,
        optim__lr=5e-4,
        optim__lr_batch_size=512,
        schedule__unit="epoch",
        schedule__warmup_epochs=5,
        schedule__lag_epochs=1,
        schedule__warmup_lr=1e-6,
        schedule__min_lr=1e-5,
    )
    by_epoch, by_step = rates(config, updates_per_epoch=3)
    assert by_epoch == pytest.approx([original_schedule(epoch) for epoch in range(300)], rel=1e-9)
    assert by_epoch[0] == by_epoch[1] == 1e-6
    assert by_step[::3] == by_step[1::3] == by_step[2::3]


def test_without_lag_the_warm_up_begins_at_once():
    changes = {"epochs": 20, "optim__lr": 1e-3, "schedule__unit": "epoch", "schedule__warmup_epochs": 5}
    by_epoch, _ = rates(tiny_config(**changes))
    assert by_epoch[:6] == pytest.approx(
        [*(1e-6 + epoch * (1e-3 - 1e-6) / 5 for epoch in range(5)), 1e-5 + 0.5 * 9.9e-4 * (1 + math.cos(math.pi / 4))]
    )


def test_a_constant_schedule_stays_at_the_peak_after_the_warm_up():
    config = tiny_config(epochs=3, optim__lr=1e-2, schedule__name="constant", schedule__warmup_epochs=1)
    _, by_step = rates(config)
    assert by_step[10:] == [1e-2] * 20
    assert by_step[0] == 1e-6


def test_a_polynomial_schedule_falls_to_its_end_over_the_steps_of_the_run():
    changes = {"optim__lr": 1e-2, "schedule__name": "poly", "schedule__min_lr": 1e-4, "schedule__warmup_steps": 4}
    config = tiny_config(epochs=3, max_steps=25, schedule__power=0.9, **changes)
    _, by_step = rates(config)
    warm_up = [1e-6 + step * (1e-2 - 1e-6) / 4 for step in range(4)]
    falling = [1e-4 + (1e-2 - 1e-4) * (1 - step / 25) ** 0.9 for step in range(4, 25)]
    assert by_step[:25] == pytest.approx(warm_up + falling, rel=1e-9)


def test_a_multistep_schedule_falls_to_a_tenth_after_each_milestone():
    changes = {"optim__lr": 1e-2, "schedule__name": "multistep", "schedule__warmup_steps": 4}
    config = tiny_config(epochs=3, max_steps=25, schedule__milestones=(10, 20), **changes)
    _, by_step = rates(config)
    warm_up = [1e-6 + step * (1e-2 - 1e-6) / 4 for step in range(4)]
    assert by_step[:25] == pytest.approx(warm_up + 6 * [1e-2] + 10 * [1e-3] + 5 * [1e-4], rel=1e-9)


@pytest.mark.parametrize(
    ("name", "milestones"), [("multistep", ()), ("cosine", (3,)), ("multistep", (5, 3)), ("multistep", (0, 3))]
)
def test_milestones_that_do_not_fit_the_schedule_are_refused(name, milestones):
    with pytest.raises(ValueError, match=r"schedule\.milestones must be"):
        tiny_config(schedule__name=name, schedule__milestones=milestones)


def test_a_warm_up_in_steps_takes_the_place_of_its_epochs():
    _, by_step = rates(tiny_config(epochs=2, schedule__warmup_epochs=2, schedule__warmup_steps=0))
    assert by_step[0] == pytest.approx(tiny_config().optim.lr)


def decayed(config):
    """Names of the parameters of the tiny Vim that decay, and of those that do not."""
    model = build_model(config.model, 10)
    optimizer = build_optimizer(model, config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert sum(len(group) for group in groups.values()) == len(names)
    return groups[config.optim.weight_decay], groups[0.0]


def test_biases_norms_tokens_and_the_named_patterns_do_not_decay():
    decay, keep = decayed(tiny_config(optim__weight_decay=0.05))
    assert "layers.0.mixer.in_proj.weight" in decay
    assert "patch_embed.proj.weight" in decay
    for name in ("mixer.A_log", "mixer.A_b_log", "mixer.D", "mixer.dt_proj.bias", "norm.weight"):
        assert f"layers.0.{name}" in keep
    assert {"cls_token", "pos_embed", "head.bias", "norm_f.weight"} <= keep


def test_without_patterns_the_state_matrix_decays_as_in_the_original():
    decay, keep = decayed(tiny_config(optim__weight_decay=0.1, optim__no_weight_decay=()))
    assert {"layers.0.mixer.A_log", "layers.0.mixer.A_b_log"} <= decay
    assert "layers.0.mixer.D" in keep


def test_with_layer_decay_a_block_learns_more_slowly_than_the_one_after_it():
    config = tiny_config(optim__layer_decay=0.5, optim__lr=1e-2, model__args={**TINY_MODEL, "depth": 3}, epochs=2)
    model = build_model(config.model, 10)
    optimizer = build_optimizer(model, config)
    schedule = Schedule(optimizer, config, 4)
    assert schedule.set(0, 0) == pytest.approx(1e-2)  # no warm-up
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(names)
    for block in range(3):
        assert rates[f"layers.{block}.mixer.A_log"] == pytest.approx(1e-2 * 0.5 ** (3 - block))
    assert rates["head.weight"] == pytest.approx(1e-2)
    assert rates["patch_embed.proj.weight"] == pytest.approx(1e-2 * 0.5**4)
    decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays["layers.1.mixer.A_log"] == decays["layers.1.mixer.D"] == 0
    assert decays["layers.1.mixer.in_proj.weight"] == 0.05


def test_the_layer_decay_of_the_stem_leaves_the_blocks_at_the_full_rate():
    changes = {"optim__layer_decay": 0.5, "optim__lr": 1e-2, "model__args": {**TINY_MODEL, "depth": 3}}
    model = build_model(tiny_config(**changes).model, 10)
    optimizer = build_optimizer(model, tiny_config(optim__layer_decay_of="stem", **changes))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales = {names[id(p)]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    lowered = {name for name, scale in scales.items() if scale != 1}
    assert lowered == {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert {scales[name] for name in lowered} == {0.5**4}


def test_the_optimizer_gets_what_the_settings_say():
    config = tiny_config(optim__lr=3e-4, optim__betas=(0.8, 0.95), optim__eps=1e-6)
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.95), 1e-6)
    sgd = build_optimizer(nn.Linear(2, 2), tiny_config(optim__name="sgd", optim__momentum=0.7))
    assert sgd.param_groups[0]["momentum"] == 0.7


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_muon_updates_the_parameters_without_decay_with_adam(layer_decay):
    config = tiny_config(optim__name="muon", optim__layer_decay=layer_decay, optim__weight_decay=0.05)
    model = build_model(config.model, 10)
    optimizer = build_optimizer(model, config)
    with_adam = {id(p) for group in optimizer.param_groups if group.get("use_fallback") for p in group["params"]}
    tables = {name for name, parameter in model.named_parameters() if id(parameter) in with_adam}
    assert {"pos_embed", "cls_token", "layers.0.mixer.A_log", "layers.0.mixer.A_b_log"} <= tables
    assert not {"patch_embed.proj.weight", "layers.0.mixer.in_proj.weight", "head.weight"} & tables


def test_an_unknown_optimizer_is_refused_with_the_nearest():
    with pytest.raises(
        ValueError, match=r"optim.name must be an optimizer that timm knows, got 'adamww': did you mean"
    ):
        build_optimizer(nn.Linear(2, 2), tiny_config(optim__name="adamww"))


def gradients(*values):
    model = nn.Linear(len(values), 1, bias=False)
    model.weight.grad = torch.tensor([values])
    return model


def test_clipping_by_value_cuts_each_gradient_and_no_clipping_changes_none():
    model = gradients(3.0, -0.5)
    norm = gradient_norm(model)
    clip_gradients(model, tiny_config(optim__clip_grad=1.0, optim__clip_mode="value").optim, norm)
    assert model.weight.grad.tolist() == [[1.0, -0.5]]
    clip_gradients(model, tiny_config(optim__clip_grad=None).optim, norm)
    assert model.weight.grad.tolist() == [[1.0, -0.5]]
