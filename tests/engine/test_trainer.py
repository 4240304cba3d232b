"""The loop learns, adds gradients up, averages weights, stops at NaN, and carries a run on to the bit."""

from __future__ import annotations

import copy
import csv
import json
import math

import pytest
import timm
import torch
from rich.console import Console

from tests.training import change, tiny_config
from vim.checkpoints.io import CheckpointError, load_checkpoint
from vim.config.load import config_to_dict, parse_command_line
from vim.config.schema import TrainConfig
from vim.data.randomness import Draw, generator_for
from vim.engine.evaluate import evaluate
from vim.engine.run_folder import RunFolder
from vim.engine.trainer import NonFiniteError, Trainer, _EpochMeter

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
TIMES = {"images_per_second", "data_wait_percent", "seconds"}


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
    losses = [row["train_loss"] for row in trainer.history]
    assert losses == sorted(losses, reverse=True)
    assert trainer.history[-1]["ema_top1"] > 70


def test_a_run_leaves_its_settings_figures_and_pictures(digits_run):
    trainer, best = digits_run
    folder = trainer.folder
    assert parse_command_line(["--config", str(folder.config)]).config == trainer.config
    with open(folder.summary, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[-1]["val_loss"]) == trainer.history[-1]["val_loss"]
    assert [int(row["step"]) for row in rows] == [22, 44, 66, 88]
    assert max(float(row[key]) for row in rows for key in ("val_top1", "ema_top1")) == best["top1"]
    start = json.loads(folder.environment.read_text(encoding="utf-8"))[0]
    assert start["versions"]["torch"] == torch.__version__
    assert start["device"] == "cpu"
    assert start["command"]
    assert folder.curves.read_bytes().startswith(b"\x89PNG")
    assert list(folder.tensorboard.glob("events.out.*"))
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
    result = evaluate(model, trainer.loaders.val)
    assert (result.top1, result.count) == (best["top1"], 360)
    assert result.loss == pytest.approx(best["loss"], rel=1e-6)


def test_the_best_checkpoint_holds_the_best_epoch_of_either_weights(digits_run):
    trainer, best = digits_run
    contents = load_checkpoint(trainer.folder.best)
    figures = [
        (row[f"{key}_top1"], -row[f"{key}_loss"], row["epoch"], weights)
        for row in trainer.history
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
    assert same(dict(averaged), dict(trainer.ema.module.state_dict()))
    assert same(dict(raw), dict(trainer.model.state_dict()))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_ends_as_an_unbroken_one_to_the_bit(tmp_path, monkeypatch, workers):
    config = tiny_config(epochs=4, data__workers=workers, schedule__warmup_epochs=1, **RANDOM)
    unbroken = make_trainer(config, tmp_path / "unbroken")
    unbroken.fit()

    broken = make_trainer(config, tmp_path / "broken")
    train_epoch = broken._train_epoch

    def fail_in_the_third(reporter):
        if broken.epoch == 2:
            broken._update(iter(broken.loaders.train), _EpochMeter())
            raise KeyboardInterrupt
        return train_epoch(reporter)

    monkeypatch.setattr(broken, "_train_epoch", fail_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    torch.manual_seed(12345)
    resumed = make_trainer(config, tmp_path / "broken")
    resumed.resume()
    assert resumed.epoch == 2
    resumed.fit()

    expected, result = (load_checkpoint(trainer.folder.last) for trainer in (unbroken, resumed))
    assert same(expected, result)
    assert len(result["history"]) == 4
    with open(resumed.folder.summary, encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == 4
    assert len(json.loads(resumed.folder.environment.read_text(encoding="utf-8"))) == 2


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
        assert trainer.step == 4
    for expected, row in zip(whole.history, parts.history, strict=True):
        for name in ("lr", "train_loss", "train_top1", "val_loss", "grad_norm"):
            assert row[name] == pytest.approx(expected[name], rel=1e-4), name
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def test_the_loop_takes_the_steps_of_one_written_by_hand(tmp_path):
    config = tiny_config(epochs=3, ema_decay=0.9, optim__lr=3e-3, schedule__warmup_epochs=1, **NO_AUGMENTATION)
    trainer = make_trainer(config, tmp_path)
    model, dataset = copy.deepcopy(trainer.model), trainer.loaders.sets.train
    averaged = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer.fit()

    images = (dataset.images / 255 - 0.309) / 0.35
    named = dict(model.named_parameters())
    kept = [p for name, p in named.items() if p.ndim == 1 or "A_" in name or name in ("cls_token", "pos_embed")]
    decayed = [p for p in named.values() if all(p is not other for other in kept)]
    groups = [{"params": kept, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.05}]
    optimizer = torch.optim.AdamW(groups, eps=1e-8)
    for step in range(9):
        epoch, place = divmod(step, 3)
        rate = 1e-6 + step * (3e-3 - 1e-6) / 3
        if step >= 3:
            rate = 1e-5 + 0.5 * (3e-3 - 1e-5) * (1 + math.cos(math.pi * step / 9))
        for group in optimizer.param_groups:
            group["lr"] = rate
        order = torch.randperm(48, generator=generator_for(Draw.ORDER, 0, epoch))[16 * place : 16 * (place + 1)]
        targets = 0.9 * torch.eye(10)[dataset.labels[order]] + 0.01
        loss = -(targets * model(images[order]).log_softmax(dim=1)).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for name, tensor in model.state_dict().items():
            averaged[name] = 0.9 * averaged[name] + 0.1 * tensor
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], tensor, atol=1e-6, rtol=1e-5, msg=name)
        torch.testing.assert_close(
            trainer.ema.module.state_dict()[name], averaged[name], atol=1e-6, rtol=1e-5, msg=name
        )


def test_the_model_is_in_training_mode_in_every_epoch(tmp_path):
    trainer = make_trainer(tiny_config(epochs=2), tmp_path)
    seen = []
    trainer.model.register_forward_hook(lambda module, *_: seen.append((trainer.epoch, module.training)))
    trainer.model.eval()
    trainer.fit()
    assert seen == [(epoch, mode) for epoch in range(2) for mode in [True] * 3 + [False]]


def test_a_batch_that_the_epoch_does_not_fill_is_left_out(tmp_path):
    trainer = make_trainer(tiny_config(batch_size=20, micro_batch_size=10), tmp_path)
    assert (len(trainer.loaders.train), trainer.updates_per_epoch) == (4, 2)
    trainer.fit()
    assert trainer.step == 2


def test_the_averaged_weights_follow_every_step(tmp_path):
    trainer = make_trainer(tiny_config(batch_size=48, micro_batch_size=16, ema_decay=0.75), tmp_path)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.fit()
    assert trainer.step == 1
    after, averaged = trainer.model.state_dict(), trainer.ema.module.state_dict()
    moved = 0
    for name, tensor in before.items():
        torch.testing.assert_close(averaged[name], 0.75 * tensor + 0.25 * after[name])
        moved += not torch.equal(averaged[name], tensor)
    assert moved > 10


def test_without_an_average_only_the_raw_weights_are_evaluated_and_saved(tmp_path):
    trainer = make_trainer(tiny_config(ema_decay=None), tmp_path)
    best = trainer.fit()
    assert best["weights"] == "raw"
    assert trainer.history[0]["ema_top1"] is None
    assert load_checkpoint(trainer.folder.last)["model_ema"] is None
    resumed = make_trainer(tiny_config(ema_decay=None), tmp_path)
    resumed.resume()
    assert resumed.fit() == best


@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
def test_a_run_in_another_precision_trains_and_saves_float32_weights(tmp_path, precision):
    trainer = make_trainer(tiny_config(epochs=2, precision=precision, optim__lr=1e-3), tmp_path)
    before = trainer.model.head.weight.detach().clone()
    trainer.fit()
    assert trainer.scaler.is_enabled() == (precision == "float16")
    assert not torch.equal(before, trainer.model.head.weight)
    assert all(tensor.dtype == torch.float32 for tensor in load_checkpoint(trainer.folder.last)["model"].values())


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    trainer = make_trainer(tiny_config(epochs=3), tmp_path)
    update = trainer._update

    def poison(batches, meter):
        if trainer.step == 4:
            with torch.no_grad():
                trainer.model.head.weight.fill_(float("nan"))
        update(batches, meter)

    trainer._update = poison
    with pytest.raises(NonFiniteError, match="the loss is nan at step 5 of 9, in epoch 2, at a learning rate of"):
        trainer.fit()
    saved = load_checkpoint(trainer.folder.last)
    assert saved["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_change(tmp_path):
    trainer = make_trainer(tiny_config(), tmp_path)
    trainer.model.head.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"the norm of the gradient is (inf|nan) at step 1 of 3, in epoch 1"):
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
    with pytest.raises(CheckpointError, match=r"last.pth cannot be resumed from: it lacks 'best'"):
        make_trainer(tiny_config(), tmp_path).resume()
