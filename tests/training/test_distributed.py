"""Several processes train and evaluate as one would, and stop, skip and fail together."""

from __future__ import annotations

import os
import shutil
import signal
import sys

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.inference.test_evaluation import Table
from tests.processes import run_command, run_together
from tests.tiny_runs import TINY_OPTIONS, tiny_config, write_image_folder
from vim import train, validate
from vim.checkpoints.io import load_checkpoint
from vim.inference.evaluation import EvaluationStopped, evaluate
from vim.runtime.agreement import Disagreement
from vim.runtime.distributed import join_processes
from vim.runtime.preemption import RunStopped
from vim.training.run_folder import RunFolder
from vim.training.trainer import Trainer

EXACT = {"augment__scale": (1.0, 1.0), "augment__ratio": (1.0, 1.0)}


def fit(config, folder):
    """Train in the processes of this run; return the history and the weights."""
    with join_processes() as processes:
        trainer = Trainer(config, RunFolder(folder), Console(quiet=True), processes)
        trainer.fit()
        state = {name: tensor.numpy() for name, tensor in trainer.model.state_dict().items()}
        return trainer.position.history, state


def steps_of(folder, figure):
    """Return what TensorBoard shows of a run, step by step."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars(figure)]


def test_two_processes_take_the_steps_of_one(tmp_path):
    config = tiny_config(
        epochs=7,
        batch_size=16,
        micro_batch_size=8,
        ema_decay=0.9,
        schedule__warmup_epochs=1,
        log__steps=1,
        optim__lr=1e-3,
        **EXACT,
    )
    history, weights = fit(config, tmp_path / "one")
    results = run_together(2, fit, config, tmp_path / "two")
    losses, rates = (steps_of(tmp_path / "one", figure) for figure in ("step/loss", "step/lr"))
    assert len(losses) == 21
    assert steps_of(tmp_path / "two", "step/loss") == pytest.approx(losses, rel=1e-5)
    assert steps_of(tmp_path / "two", "step/lr") == rates
    for two_history, two_weights in results:
        for name, expected in weights.items():
            torch.testing.assert_close(
                torch.from_numpy(two_weights[name]), torch.from_numpy(expected), atol=1e-5, rtol=1e-5, msg=name
            )
        assert [row["val_top1"] for row in two_history] == [row["val_top1"] for row in history]
    saved = load_checkpoint(tmp_path / "two" / "last.pth")
    assert len(saved["rng"]) == 2
    assert not torch.equal(saved["rng"][0]["torch"], saved["rng"][1]["torch"])


def evaluate_share(logits, labels, stop_in=None):
    with join_processes() as processes:
        mine = torch.arange(processes.rank, len(labels), processes.size)
        batches = [(part.view(-1, 1, 1, 1), labels[part]) for part in mine.split(7)]
        try:
            return evaluate(Table(logits), batches, processes=processes, stop_asked=lambda: processes.rank == stop_in)
        except EvaluationStopped:
            return "stopped"


@pytest.mark.parametrize(("images", "processes"), [(103, 2), (10, 3), (2, 3)])
def test_every_image_is_evaluated_once_by_any_number_of_processes(images, processes):
    torch.manual_seed(0)
    logits, labels = torch.randn(images, 8), torch.randint(0, 8, (images,))
    expected = evaluate_share(logits, labels)
    for result in run_together(processes, evaluate_share, logits, labels):
        assert (result.count, result.top1, result.top5) == (images, expected.top1, expected.top5)
        assert result.loss == pytest.approx(expected.loss, rel=1e-12)


def test_a_stop_in_one_process_ends_the_evaluation_of_all():
    logits, labels = torch.randn(40, 8), torch.randint(0, 8, (40,))
    assert run_together(2, evaluate_share, logits, labels, 1) == ["stopped", "stopped"]


def stop_one(config, folder):
    with join_processes() as processes:
        trainer = Trainer(config, RunFolder(folder), Console(quiet=True), processes)
        choose = trainer.schedule.set

        def interrupt(epoch, step):
            if step == 4 and processes.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return choose(epoch, step)

        trainer.schedule.set = interrupt
        try:
            trainer.fit()
        except RunStopped as stopped:
            return str(stopped)
        return None


def test_sigterm_to_one_process_stops_all_after_the_same_step(tmp_path):
    config = tiny_config(epochs=3)
    messages = run_together(2, stop_one, config, tmp_path / "run")
    assert messages == ["stopped by SIGTERM after step 5, and saved"] * 2
    position = load_checkpoint(tmp_path / "run" / "last.pth")["position"]
    assert (position["epoch"], position["updates"], position["step"]) == (1, 2, 5)


def overflow_once(config, folder):
    """The gradient of one process overflows in the third step."""

    def poison(trainer):
        def hook(gradient):
            overflows = trainer.position.step == 2 and trainer.processes.rank == 1
            return gradient * float("inf") if overflows else gradient

        trainer.model.head.weight.register_hook(hook)

    with join_processes() as processes:
        trainer = Trainer(config, RunFolder(folder), Console(quiet=True), processes)
        poison(trainer)
        weights, choose = {}, trainer.schedule.set

        def watch(epoch, step):
            weights[trainer.position.step] = trainer.model.head.weight.detach().clone()
            return choose(epoch, step)

        trainer.schedule.set = watch
        trainer.fit()
        unchanged = list(map(torch.equal, weights.values(), (*list(weights.values())[1:], trainer.model.head.weight)))
        return unchanged, trainer.state.scaler.get_scale(), trainer.position.history[0]["skipped_steps"]


def test_an_overflow_of_float16_in_one_process_is_skipped_by_both(tmp_path):
    config = tiny_config(epochs=2, precision="float16", optim__lr=1e-3)
    first, second = run_together(2, overflow_once, config, tmp_path / "run")
    assert first == second
    unchanged, scale, skipped = first
    assert unchanged == [False, False, True, False, False, False]
    assert (scale, skipped) == (2.0**15, 1)
    resumed = Trainer(config, RunFolder(tmp_path / "run"), Console(quiet=True))
    resumed.resume()
    assert resumed.state.scaler.get_scale() == scale


def failing_main(arguments):
    if os.environ.get("RANK") == "1":
        arguments = [*arguments, "--data.crop_pct", "7"]
    return train.main(arguments)


def test_a_process_that_cannot_begin_takes_the_others_with_it(tmp_path, capfd):
    arguments = ["--epochs", "1", "--schedule.warmup_epochs", "0", "--device", "cpu", "--output", str(tmp_path / "run")]
    assert run_together(2, failing_main, arguments) == [2, 2]
    assert capfd.readouterr().err.splitlines() == ["vim.train: data.crop_pct must be > 0 and <= 1, got 7.0"]
    assert not (tmp_path / "run").exists()


def differing_main(arguments, more, images):
    """Start process 1 with other arguments, and with other images than the first."""
    if os.environ.get("RANK") == "1":
        arguments = [*arguments, *more, *(["--data.path", images] if images else [])]
    return train.main(arguments)


DIFFERENT = {
    "settings": (["--optim.lr", "1.0", "--seed", "3"], None, "seed: 0 in process 0, 3 in process 1; optim.lr: "),
    "sizes": (["--epochs", "2"], None, "epochs: 1 in process 0, 2 in process 1"),
    "classes": ([], "bee renamed", "the name of class 1: 'bee' in process 0, 'cow' in process 1"),
    "images": ([], "bee other", "the training images of class 1, 'bee': '3 images (checksum"),
    "fewer": ([], "bee fewer", "the number of training images: 6 in process 0, 5 in process 1"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_processes_that_were_started_differently_are_refused_with_what_differs(tmp_path, capfd, name):
    more, change, words = DIFFERENT[name]
    images = write_image_folder(tmp_path / "images", ["ant", "bee"], {"train": 3, "val": 1})
    other = None
    if change is not None:
        other = shutil.copytree(images, tmp_path / "other")
        bee = other / "train" / "bee"
        if change == "bee renamed":
            for split in ("train", "val"):
                (other / split / "bee").rename(other / split / "cow")
        elif change == "bee other":
            (bee / "0.jpg").rename(bee / "zero.jpg")
        else:
            (bee / "0.jpg").unlink()
    arguments = ["--data.dataset", "folder", "--data.path", str(images), "--model.in_chans", "3"]
    arguments += [*TINY_OPTIONS, "--batch_size", "4", "--micro_batch_size", "2", "--output", str(tmp_path / "run")]
    assert run_together(2, differing_main, arguments, more, other and str(other)) == [2, 2]
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("vim.train")]
    assert line.startswith("vim.train: all processes must be started alike, and they differ in ")
    assert words in line
    assert not (tmp_path / "run").exists()


def train_with_another_weight(config, folder):
    with join_processes() as processes:
        trainer = Trainer(config, RunFolder(folder), Console(quiet=True), processes)
        with torch.no_grad():
            trainer.model.head.weight *= 1 + 0.5 * processes.rank
        with pytest.raises(Disagreement) as raised:
            trainer.fit()
        return str(raised.value)


def test_processes_that_start_from_other_weights_are_refused(tmp_path):
    first, second = run_together(2, train_with_another_weight, tiny_config(), tmp_path / "run")
    assert first == second
    assert first.startswith("all processes must be started alike, and they differ in the norm of head.weight: ")


def validate_with(arguments, more):
    return validate.main([*arguments, *(more if os.environ.get("RANK") == "1" else [])])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--precision", "bfloat16"], "--precision: 'float32' in process 0, 'bfloat16' in process 1"),
        (["--weights", "raw"], "--weights: 'ema' in process 0, 'raw' in process 1"),
        (["--split", "train"], "--split: 'val' in process 0, 'train' in process 1"),
        (["--path", "/nowhere"], "data.path must be a folder of images, and '/nowhere' is not a folder"),
    ],
)
def test_processes_that_evaluate_something_else_are_refused(tmp_path, capfd, more, words):
    images = write_image_folder(tmp_path / "images", ["ant", "bee"], {"train": 8, "val": 1})
    config = tiny_config(
        data__dataset="folder", data__path=str(images), model__in_chans=3, best_by="ema", optim__lr=0.1, ema_decay=0.9
    )
    Trainer(config, RunFolder(tmp_path / "run"), Console(quiet=True)).fit()
    arguments = [str(tmp_path / "run"), "--device", "cpu", "--output", str(tmp_path / "out")]
    assert run_together(2, validate_with, arguments, more) == [2, 2]
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("vim.validate")]
    assert words in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_torchrun_trains_on_a_cpu(tmp_path):
    folder = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "vim.train"),
        *("--data.dataset", "synthetic", "--data.synthetic_images", "64", "--device", "cpu", "--output", str(folder)),
        *("--model.img_size", "16", "--model.args", "{patch_size: 8, embed_dim: 16, depth: 1, d_state: 4}"),
        *("--epochs", "2", "--schedule.warmup_epochs", "0"),
    ]
    printed = run_command(*command, timeout=300)
    assert "batch 64 = 2 x 32" in printed
    assert printed.count("epoch 1/2") == 1  # one process talks
    assert printed.count(f"report: {folder / 'report.html'}") == 1
    assert load_checkpoint(folder / "last.pth")["position"]["epoch"] == 2


def test_without_torchrun_a_process_is_alone():
    with join_processes() as processes:
        assert (processes.rank, processes.size, processes.is_main) == (0, 1, True)
        assert processes.gather("a") == ["a"]
        assert processes.broadcast("a") == "a"
        assert processes.sum(torch.ones(2)).tolist() == [1, 1]
        assert not dist.is_initialized()
