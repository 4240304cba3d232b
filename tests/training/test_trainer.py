"""The loop learns, adds gradients up, averages weights, stops at NaN, and carries a run on to the bit."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import signal
from itertools import pairwise

import pytest
import timm
import torch
from rich.console import Console

from tests.tiny_runs import TINY_MODEL, change, read_table, tiny_config, write_image_folder
from vim.checkpoints.io import CheckpointError, load_checkpoint
from vim.config.load import config_to_dict, parse_command_line
from vim.config.run import SaveConfig
from vim.config.schema import TrainConfig
from vim.data.randomness import Draw, generator_for
from vim.inference.evaluation import evaluate
from vim.runtime.preemption import RunStopped
from vim.training import saving
from vim.training.nonfinite import NonFiniteError
from vim.training.run_folder import RunFolder
from vim.training.trainer import Trainer

NO_AUGMENTATION = {"augment__scale": (1.0, 1.0), "augment__ratio": (1.0, 1.0)}
# Everything that draws random numbers while training.
RANDOM = {
    "augment__mixup": 0.8,
    "augment__cutmix": 1.0,
    "augment__erase_prob": 0.25,
    "augment__hflip": 0.5,
    "model__drop_rate": 0.1,
    "model__drop_path_rate": 0.2,
    "model__args": {"patch_size": 8, "embed_dim": 16, "depth": 2, "d_state": 4},
}
# What depends on the clock.
TIMES = {"images_per_second", "data_wait_percent", "seconds", "waited", "memory_gib"}


def make_trainer(config, path):
    return Trainer(config, RunFolder(path), Console(quiet=True))


def same(a, b):
    """Whether two checkpoints hold the same, to the bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in TIMES)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A short run on the digits."""
    config = change(
        TrainConfig(),
        epochs=4,
        device="cpu",
        ema_decay=0.9,
        model__img_size=16,
        model__args={"patch_size": 4, "embed_dim": 32, "depth": 2, "d_state": 4},
        optim__lr=5e-3,
        schedule__warmup_epochs=1,
    )
    trainer = make_trainer(config, tmp_path_factory.mktemp("digits") / "run")
    return trainer, trainer.fit()


def test_a_small_vim_learns_the_digits_in_a_few_epochs(digits_run):
    trainer, best = digits_run
    assert best["top1"] > 80
    losses = [row["train_loss"] for row in trainer.position.history]
    assert losses == sorted(losses, reverse=True)
    assert trainer.position.history[-1]["ema_top1"] > 70


def test_a_run_leaves_its_settings_figures_and_pictures(digits_run):
    trainer, best = digits_run
    folder = trainer.folder
    assert parse_command_line(["--config", str(folder.config)]).config == trainer.config
    rows = read_table(folder.summary)
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[-1]["val_loss"]) == trainer.position.history[-1]["val_loss"]
    assert [int(row["step"]) for row in rows] == [22, 44, 66, 88]
    assert max(float(row[key]) for row in rows for key in ("val_top1", "ema_top1")) == best["top1"]
    start = json.loads(folder.environment.read_text(encoding="utf-8"))[0]
    assert start["versions"]["torch"] == torch.__version__
    assert start["device"] == "cpu"
    assert start["command"]
    assert folder.curves.read_bytes().startswith(b"\x89PNG")
    assert list((folder.path / "tensorboard").glob("events.out.*"))
    assert sorted(path.name[0] for path in folder.samples.glob("*.png")) == list("0123456789")
    assert not list(folder.path.glob(".*"))


def test_the_weights_load_through_timm_and_give_the_recorded_accuracy(digits_run):
    trainer, best = digits_run
    config = trainer.config.model
    model = timm.create_model(
        config.name,
        checkpoint_path=str(trainer.folder.best_weights),
        num_classes=10,
        in_chans=1,
        img_size=16,
        **config.args,
    )
    result = evaluate(model, trainer.task.loaders.val)
    assert (result.top1, result.count) == (best["top1"], 360)
    assert result.loss == pytest.approx(best["loss"], rel=1e-6)


def test_the_best_checkpoint_holds_the_best_epoch_of_either_weights(digits_run):
    trainer, best = digits_run
    contents = load_checkpoint(trainer.folder.best)
    figures = [
        (row[f"{key}_top1"], -row[f"{key}_loss"], row["epoch"], weights)
        for row in trainer.position.history
        for key, weights in (("val", "raw"), ("ema", "ema"))
    ]
    assert (best["top1"], -best["loss"], best["epoch"], best["weights"]) == max(figures)
    assert (contents["epoch"], contents["weights"]) == (best["epoch"], best["weights"])
    assert contents["class_names"] == list("0123456789")
    assert contents["config"] == config_to_dict(trainer.config)


def test_the_last_checkpoint_is_one_that_timm_understands(digits_run):
    trainer, _ = digits_run
    averaged = timm.models.load_state_dict(str(trainer.folder.last), use_ema=True)
    raw = timm.models.load_state_dict(str(trainer.folder.last), use_ema=False)
    assert same(dict(averaged), dict(trainer.state.ema.module.state_dict()))
    assert same(dict(raw), dict(trainer.model.state_dict()))


class Killed(BaseException):
    """Ends a run without any of its own endings."""


def train_until(trainer, step):
    """Train, and stop dead before the given step."""
    choose = trainer.schedule.set

    def die(epoch, done):
        if trainer.position.step == step and done == step:
            raise Killed
        return choose(epoch, done)

    trainer.schedule.set = die
    with pytest.raises(Killed):
        trainer.fit()


@pytest.fixture(scope="module")
def images_folder(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("images"), ["ant", "bee"], {"train": 12, "val": 4}, (20, 20))


@pytest.mark.parametrize(
    ("workers", "files", "save_steps", "deaths"),
    [(0, False, None, [7]), (2, False, 1, [4]), (0, True, 2, [2, 5]), (2, True, 1, [7])],
    ids=["whole epochs", "workers", "files", "files and workers"],
)
def test_a_resumed_run_ends_as_an_unbroken_one_to_the_bit(tmp_path, images_folder, workers, files, save_steps, deaths):
    """The runs are of 3 steps an epoch; a run that is not saved within an epoch goes back to the end of the last."""
    changes = {"epochs": 3, "data__workers": workers, "schedule__warmup_epochs": 1, **RANDOM}
    if files:
        changes |= {"data__dataset": "folder", "data__path": str(images_folder), "model__in_chans": 3}
        changes |= {"batch_size": 8, "micro_batch_size": 4, "augment__auto_augment": "rand-m9-mstd0.5-inc1"}
    unbroken = make_trainer(tiny_config(**changes), tmp_path / "unbroken")
    unbroken.fit()

    config = tiny_config(**changes, save__steps=save_steps)
    for death in deaths:
        torch.manual_seed(12345 + death)
        broken = make_trainer(config, tmp_path / "broken")
        broken.resume()
        train_until(broken, death)
    resumed = make_trainer(config, tmp_path / "broken")
    resumed.resume()
    assert resumed.position.step == (deaths[-1] - deaths[-1] % (save_steps or 3))
    resumed.fit()

    for name in ("last", "best"):
        expected, result = (load_checkpoint(getattr(trainer.folder, name)) for trainer in (unbroken, resumed))
        assert same({**expected, "config": None}, {**result, "config": None})
    assert unbroken.folder.best_weights.read_bytes()[-4096:] == resumed.folder.best_weights.read_bytes()[-4096:]
    summaries = [read_table(trainer.folder.summary) for trainer in (unbroken, resumed)]
    assert same(*summaries)
    assert len(summaries[0]) == 3
    assert len(json.loads(resumed.folder.environment.read_text(encoding="utf-8"))) == len(deaths) + 1


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(tmp_path):
    expected = make_trainer(tiny_config(**RANDOM), tmp_path / "unbroken")
    expected.fit()
    train_until(make_trainer(tiny_config(**RANDOM), tmp_path / "broken"), 2)
    resumed = make_trainer(tiny_config(**RANDOM), tmp_path / "broken")
    resumed.resume()
    resumed.fit()
    assert same(dict(expected.model.state_dict()), dict(resumed.model.state_dict()))


@pytest.mark.parametrize("during", ["training", "evaluation"])
def test_sigterm_saves_the_step_and_the_run_goes_on_to_the_same_end(tmp_path, monkeypatch, during):
    unbroken = make_trainer(tiny_config(epochs=2, **RANDOM), tmp_path / "unbroken")
    unbroken.fit()
    broken = make_trainer(tiny_config(epochs=2, **RANDOM), tmp_path / "broken")
    before = signal.getsignal(signal.SIGTERM)
    broken.model.register_forward_hook(
        lambda module, *_: (
            os.kill(os.getpid(), signal.SIGTERM)
            if broken.position.step == (4 if during == "training" else 3) and module.training == (during == "training")
            else None
        )
    )
    with pytest.raises(
        RunStopped, match=f"stopped by SIGTERM after step {5 if during == 'training' else 3}, and saved"
    ):
        broken.fit()
    assert signal.getsignal(signal.SIGTERM) is before
    resumed = make_trainer(tiny_config(epochs=2, **RANDOM), tmp_path / "broken")
    resumed.resume()
    resumed.fit()
    assert same(load_checkpoint(unbroken.folder.last), load_checkpoint(resumed.folder.last))


def test_a_checkpoint_is_due_after_steps_or_minutes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    clock = saving.SaveClock(SaveConfig(steps=10, minutes=2.0))
    assert [step for step in range(1, 31) if clock.is_due(step)] == [10, 20, 30]
    now[0] = 119.0
    assert not clock.is_due(31)
    now[0] = 120.0
    assert clock.is_due(31)
    clock.restart()
    assert not clock.is_due(31)
    now[0] = 1e9
    assert not saving.SaveClock(SaveConfig(steps=None, minutes=None)).is_due(10)


def test_training_twice_gives_the_same_and_another_seed_does_not(tmp_path):
    weights = []
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        trainer = make_trainer(tiny_config(seed=seed, **RANDOM), tmp_path / name)
        trainer.fit()
        weights.append(dict(trainer.model.state_dict()))
    assert same(weights[0], weights[1])
    assert not same(weights[0], weights[2])


def test_gradients_of_small_batches_add_up_to_those_of_the_whole(tmp_path):
    changes = {"epochs": 2, "batch_size": 24, "optim__lr": 1e-3, **NO_AUGMENTATION}
    whole = make_trainer(tiny_config(micro_batch_size=24, **changes), tmp_path / "whole")
    parts = make_trainer(tiny_config(micro_batch_size=6, **changes), tmp_path / "parts")
    for trainer in (whole, parts):
        trainer.fit()
        assert trainer.position.step == 4
    for expected, row in zip(whole.position.history, parts.position.history, strict=True):
        for name in ("lr", "train_loss", "train_top1", "val_loss", "grad_norm"):
            assert row[name] == pytest.approx(expected[name], rel=1e-4), name
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def rate_by_steps(epoch, step):
    """Three steps of warm-up, then a cosine over nine."""
    if step < 3:
        return 1e-6 + step * (3e-3 - 1e-6) / 3
    return 1e-5 + 0.5 * (3e-3 - 1e-5) * (1 + math.cos(math.pi * step / 9))


def rate_of_the_original(epoch, step):
    """Two epochs of warm-up, then a cosine over ten; the schedule is told the number of the epoch that has ended."""
    ended = max(0, epoch - 1)
    if ended < 2:
        return 1e-6 + ended * (1e-3 - 1e-6) / 2
    return 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * ended / 10))


OWN = {"epochs": 3, "micro_batch_size": 8, "ema_decay": 0.9, "optim__lr": 3e-3, "schedule__warmup_epochs": 1}
ORIGINAL = {
    **{"epochs": 10, "data__synthetic_images": 80, "ema_decay": 0.99, "optim__lr": 1e-3, "optim__weight_decay": 0.1},
    **{"optim__clip_grad": None, "optim__no_weight_decay": ()},
    **{"schedule__unit": "epoch", "schedule__lag_epochs": 1, "schedule__warmup_epochs": 2},
}


@pytest.mark.parametrize(
    ("settings", "rate_of"), [(OWN, rate_by_steps), (ORIGINAL, rate_of_the_original)], ids=["own", "original"]
)
def test_the_loop_takes_the_steps_of_one_written_by_hand(tmp_path, settings, rate_of):
    """Two micro-batches a step and clipping; or fifty steps of the original's recipe, in which A_log decays."""
    config = tiny_config(**settings, **NO_AUGMENTATION)
    trainer = make_trainer(config, tmp_path)
    model, dataset = copy.deepcopy(trainer.model), trainer.task.loaders.sets.train
    averaged = {name: tensor.double() for name, tensor in model.state_dict().items()}
    trainer.fit()

    images = (dataset.images / 255 - 0.309) / 0.35
    kept, decayed = [], []
    for name, parameter in model.named_parameters():
        keeps_all = parameter.ndim == 1 or name in ("cls_token", "pos_embed") or (settings is OWN and "A_" in name)
        (kept if keeps_all else decayed).append(parameter)
    groups = [{"params": kept, "weight_decay": 0.0}, {"params": decayed, "weight_decay": config.optim.weight_decay}]
    optimizer = torch.optim.AdamW(groups, eps=1e-8)
    step = 0
    for epoch in range(config.epochs):
        order = torch.randperm(len(images), generator=generator_for(Draw.ORDER, 0, epoch))
        for batch in order.split(16):
            for group in optimizer.param_groups:
                group["lr"] = rate_of(epoch, step)
            targets = 0.9 * torch.eye(10)[dataset.labels[batch]] + 0.01
            loss = -(targets * model(images[batch]).log_softmax(dim=1)).sum(dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            if settings is OWN:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            decay = config.ema_decay
            averaged = {n: decay * averaged[n] + (1 - decay) * tensor for n, tensor in model.state_dict().items()}
    assert trainer.position.step == step
    for name, tensor in model.state_dict().items():
        found = (trainer.model.state_dict()[name], trainer.state.ema.module.state_dict()[name])
        expected = (tensor, averaged[name].float())
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("setting", ["compile", "model__grad_checkpointing"])
def test_how_the_model_is_run_changes_nothing_that_it_learns(tmp_path, monkeypatch, setting):
    compiled = []

    def compile_without_code(module):
        compiled.append(module)
        return torch_compile(module, backend="eager")

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile_without_code)
    changes = {"epochs": 2, "model__args": RANDOM["model__args"], "optim__lr": 1e-3}
    plain, other = (
        make_trainer(tiny_config(**changes, **more), tmp_path / str(len(more))) for more in ({}, {setting: True})
    )
    assert other.model is not plain.model
    recomputed = []
    other.model.layers[0].register_forward_pre_hook(lambda module, _: recomputed.append(module.training))
    for trainer in (plain, other):
        trainer.fit()
    assert len(compiled) == (setting == "compile")
    if setting == "model__grad_checkpointing":
        assert recomputed.count(True) == 2 * 6  # the forward pass of six steps, and once more in the backward pass
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[name], tensor, atol=1e-6, rtol=1e-5, msg=name)
    best = load_checkpoint(other.folder.best)
    assert best["model"].keys() == plain.model.state_dict().keys()


def test_progressive_resolution_needs_a_model_of_any_size(tmp_path):
    changes = {"epochs": 3, "model__img_size": 32, "progressive__start_size": 16}
    with pytest.raises(ValueError, match=r"progressive.start_size must be null for model.name .*dynamic_img_size true"):
        make_trainer(tiny_config(**changes), tmp_path / "one size")
    config = tiny_config(**changes, model__args={**TINY_MODEL, "dynamic_img_size": True})
    trainer = make_trainer(config, tmp_path / "any size")
    seen = []
    trainer.model.patch_embed.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].shape[-1]) if module.training else None
    )
    trainer.fit()
    assert seen == [16] * 3 + [32] * 6  # 24 rounds to 32


def test_the_model_is_in_training_mode_in_every_epoch(tmp_path):
    trainer = make_trainer(tiny_config(epochs=2), tmp_path)
    seen = []
    trainer.model.register_forward_hook(lambda module, *_: seen.append((trainer.position.epoch, module.training)))
    trainer.model.eval()
    trainer.fit()
    assert seen == [(epoch, mode) for epoch in range(2) for mode in [True] * 3 + [False]]


def test_a_run_of_steps_ends_within_an_epoch_and_resumes_to_the_same_end(tmp_path):
    config = tiny_config(max_steps=5, batch_size=16, data__synthetic_images=48)  # three steps an epoch
    whole = make_trainer(config, tmp_path / "whole")
    whole.fit()
    assert [row["step"] for row in whole.position.history] == [3, 5]
    assert whole.position.history[-1]["lr"] < whole.position.history[0]["lr"]
    saving_often = change(config, save__steps=1)
    broken = make_trainer(saving_often, tmp_path / "broken")
    train_until(broken, 4)
    resumed = make_trainer(saving_often, tmp_path / "broken")
    resumed.resume()
    assert resumed.position.step == 4
    resumed.fit()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    again = make_trainer(saving_often, tmp_path / "broken")
    again.resume()
    assert again.fit() == resumed.position.best  # nothing is left to do


def test_a_batch_that_the_epoch_does_not_fill_is_left_out(tmp_path):
    trainer = make_trainer(tiny_config(batch_size=20, micro_batch_size=10), tmp_path)
    assert (len(trainer.task.loaders.train), trainer.updates_per_epoch) == (4, 2)
    trainer.fit()
    assert trainer.position.step == 2


def test_without_an_average_only_the_raw_weights_are_evaluated_and_saved(tmp_path):
    trainer = make_trainer(tiny_config(ema_decay=None), tmp_path)
    best = trainer.fit()
    assert best["weights"] == "raw"
    assert trainer.position.history[0]["ema_top1"] is None
    assert read_table(trainer.folder.summary)[0]["ema_top1"] == ""
    assert load_checkpoint(trainer.folder.last)["model_ema"] is None
    resumed = make_trainer(tiny_config(ema_decay=None), tmp_path)
    resumed.resume()
    assert resumed.fit() == best


@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
def test_a_run_in_another_precision_trains_and_saves_float32_weights(tmp_path, precision):
    trainer = make_trainer(tiny_config(epochs=2, precision=precision, optim__lr=1e-3), tmp_path)
    before = trainer.model.head.weight.detach().clone()
    trainer.fit()
    assert trainer.state.scaler.is_enabled() == (precision == "float16")
    assert not torch.equal(before, trainer.model.head.weight)
    assert all(tensor.dtype == torch.float32 for tensor in load_checkpoint(trainer.folder.last)["model"].values())


def test_a_step_that_is_not_finite_is_skipped_and_its_input_named(tmp_path):
    out = io.StringIO()
    trainer = Trainer(tiny_config(epochs=2, ema_decay=0.5), RunFolder(tmp_path), Console(file=out, width=300))
    loss_of, states = trainer.task.training_loss, []

    def poison(model, batch):
        states.append(
            [dict(copy.deepcopy(module.state_dict())) for module in (trainer.model, trainer.state.ema.module)]
        )
        if trainer.position.step == 2:
            batch.images[5, 0, 3, 3] = float("nan")
        return loss_of(model, batch)

    trainer.task.training_loss = poison
    trainer.fit()
    assert [same(before, after) for before, after in pairwise(states)] == [False, False, True, False, False]
    assert [row["skipped_steps"] for row in trainer.position.history] == [1, 0]
    assert all(math.isfinite(row["train_loss"]) for row in trainer.position.history)
    (line,) = [line for line in out.getvalue().splitlines() if line.startswith("step skipped")]
    assert "the loss is nan at step 3 of 6, in epoch 1, at a learning rate of" in line
    assert "the first bad tensor is the input (image 5 of the micro-batch)" in line


def test_too_many_bad_steps_in_a_row_stop_the_run_and_name_the_activation(tmp_path):
    trainer = make_trainer(tiny_config(epochs=4, max_skipped_steps=3), tmp_path)

    def explode(module, inputs, output):
        return output * float("inf") if trainer.position.step in (3, 5, 6, 7) else output

    trainer.model.patch_embed.register_forward_hook(explode)
    words = r"the loss is nan at step 8 of 12, in epoch 3, .* the activation of patch_embed; the last 3 steps were not"
    with pytest.raises(NonFiniteError, match=words):
        trainer.fit()
    saved = load_checkpoint(trainer.folder.last)
    assert saved["position"]["epoch"] == 2
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


def test_a_weight_that_is_not_finite_stops_the_run_at_once(tmp_path):
    trainer = make_trainer(tiny_config(epochs=3), tmp_path)
    choose = trainer.schedule.set

    def poison(epoch, step):
        if step == 4:
            with torch.no_grad():
                trainer.model.head.weight.fill_(float("nan"))
        return choose(epoch, step)

    trainer.schedule.set = poison
    with pytest.raises(NonFiniteError, match=r"the loss is nan at step 5 of 9.* is the parameter head.weight"):
        trainer.fit()
    saved = load_checkpoint(trainer.folder.last)
    assert saved["position"]["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    trainer = make_trainer(tiny_config(epochs=2), tmp_path)
    step = trainer.state.optimizer.step

    def overflow(*arguments, **more):
        step(*arguments, **more)
        if trainer.position.step == 5:
            with torch.no_grad():
                trainer.model.norm_f.weight[3] = float("inf")

    trainer.state.optimizer.step = overflow
    with pytest.raises(NonFiniteError, match=r"the parameter norm_f.weight is not finite after step 6"):
        trainer.fit()
    assert load_checkpoint(trainer.folder.last)["position"]["epoch"] == 1


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_change(tmp_path):
    trainer = make_trainer(tiny_config(max_skipped_steps=1), tmp_path)
    trainer.model.head.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    words = r"the norm of the gradient is (inf|nan) at step 1 of 3, in epoch 1.* is the gradient of head.weight"
    with pytest.raises(NonFiniteError, match=words):
        trainer.fit()
    assert same(before, dict(trainer.model.state_dict()))
    assert not trainer.folder.last.exists()


def test_a_checkpoint_of_another_model_is_not_resumed_from(tmp_path):
    make_trainer(tiny_config(), tmp_path).fit()
    wider = {"patch_size": 8, "embed_dim": 24, "depth": 1, "d_state": 4}
    with pytest.raises(
        CheckpointError, match=r"last.pth does not fit the model: '\w+' has shape \(.*16\), .* \(.*24\)"
    ):
        make_trainer(tiny_config(model__args=wider), tmp_path).resume()
    (tmp_path / "last.pth").unlink()
    (tmp_path / "best.pth").rename(tmp_path / "last.pth")
    with pytest.raises(CheckpointError, match=r"last.pth cannot be resumed from: it lacks 'optimizer'"):
        make_trainer(tiny_config(), tmp_path).resume()
