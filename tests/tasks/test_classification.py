"""The task `classification`, its figures, its words and its pictures, and how a setting chooses a task."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from PIL import Image

from tests.tiny_runs import read_table, tiny_config
from vim.checkpoints.io import load_checkpoint, save_checkpoint
from vim.config.load import parse_command_line
from vim.config.schema import TaskName, TrainConfig
from vim.data.digits import CLASS_NAMES, load_digits
from vim.inference.plots import draw_curves
from vim.runtime.distributed import Processes
from vim.tasks import registry
from vim.tasks.classification import ClassificationTask
from vim.tasks.registry import TASKS, open_task
from vim.tasks.samples import write_samples
from vim.tasks.task import Batch, Evaluation
from vim.training.run_folder import RunFolder
from vim.training.trainer import Trainer

CPU = torch.device("cpu")
ROW = {
    "epoch": 1,
    "step": 10,
    "lr": 1e-3,
    "train_loss": 1.5,
    "train_top1": 50.0,
    "val_loss": 1.25,
    "val_top1": 62.5,
    "ema_loss": None,
    "ema_top1": None,
    "grad_norm": 0.512,
    "skipped_steps": 0,
    "images_per_second": 1234.5,
    "data_wait_percent": 3.2,
    "memory_gib": 1.25,
    "seconds": 75.0,
}


def test_every_task_that_a_setting_may_name_is_there():
    assert set(TASKS) == set(get_args(TaskName))


def test_an_unknown_task_is_refused_with_the_known_ones():
    known = "'classification', 'segmentation', 'detection'"
    with pytest.raises(ValueError, match=f"task must be one of {known}, got 'origami'"):
        TrainConfig(task="origami")
    with pytest.raises(ValueError, match=r"task.* one of 'classification'.*origami"):
        parse_command_line(["--task", "origami"])


def test_a_checkpoint_and_a_run_folder_from_before_the_setting_are_resumed(tmp_path):
    Trainer(tiny_config(epochs=1), RunFolder(tmp_path / "run")).fit()
    last = tmp_path / "run" / "last.pth"
    contents = load_checkpoint(last)
    del contents["config"]["task"]
    contents["config"]["epochs"] = 2
    save_checkpoint(last, contents)
    settings = tmp_path / "run" / "config.yaml"
    text = settings.read_text().replace("task: classification\n", "").replace("epochs: 1\n", "epochs: 2\n")
    assert "task" not in text
    settings.write_text(text)
    command = parse_command_line(["--resume", str(tmp_path / "run")])
    assert command.config.task == "classification"
    resumed = Trainer(command.config, RunFolder(tmp_path / "run"))
    resumed.resume()
    assert resumed.position.epoch == 1
    resumed.fit()
    assert len(resumed.position.history) == 2


def open_tiny(**changes):
    return open_task(tiny_config(**changes), CPU, Processes())


def test_the_best_epoch_has_the_highest_accuracy_and_then_the_lowest_loss():
    task = open_tiny()
    ranked = [{"top1": 50.0, "loss": 1.0}, {"top1": 60.0, "loss": 3.0}, {"top1": 60.0, "loss": 2.0}]
    assert sorted(reversed(ranked), key=task.score) == ranked


def test_figures_in_words():
    task = open_tiny()
    assert task.describe_training(task.training_figures({"hits": 3.0}, 4)) == "accuracy 75.0 %"
    words = "training: loss 1.500,  50.0 %  held out: loss 1.250,  62.5 %"
    assert task.describe_epoch(ROW) == words
    assert task.describe_epoch({**ROW, "ema_top1": 99.0}) == f"{words}  EMA  99.0 %"
    assert task.describe_best({"top1": 62.5, "loss": 1.0}) == "62.50 % of the held-out images right"


def test_a_resumed_epoch_goes_on_with_the_batch_after_the_last_one():
    task = open_tiny()
    whole = list(task.batches(1, 0))
    rest = list(task.batches(1, 2))
    assert [batch.place for batch in whole] == [(1, 0), (1, 1), (1, 2)]
    assert rest[0].place == (1, 2)
    assert torch.equal(rest[0].images, whole[2].images)
    assert torch.equal(rest[0].targets, whole[2].targets)


class Brightness:
    """A task of another kind: the model tells how bright an image is."""

    sums = ("far", "near")
    headline = ("error",)

    def __init__(self, config, device, processes):
        self._task = ClassificationTask(config, device, processes)
        self.batches_per_epoch = self._task.batches_per_epoch

    def __getattr__(self, name):
        if name in ("build_model", "image_shape", "take_unreadable", "describe_data", "example_image", "facts"):
            return getattr(self._task, name)
        if name in ("write_data_record", "data_changes", "weights_metadata"):
            return getattr(self._task, name)
        raise AttributeError(name)

    def batches(self, epoch, first):
        return (Batch(b.images, b.images.mean(dim=(1, 2, 3)), b.place) for b in self._task.batches(epoch, first))

    def training_loss(self, model, batch):
        errors = (model(batch.images)[:, 0] - batch.targets).abs()
        return errors.mean(), torch.stack([(errors > 0.1).sum(), (errors <= 0.1).sum()]).float()

    def training_figures(self, sums, images):
        assert sum(sums.values()) == images
        return {"near": sums["near"] / max(1, images)}

    def evaluate(self, model, processes, stop_asked):
        images = next(iter(self._task.loaders.val))[0]
        with torch.no_grad():
            error = (model(images)[:, 0] - images.mean(dim=(1, 2, 3))).abs().mean().item()
        return Evaluation(figures={"loss": error, "error": error}, unreadable=0)

    def score(self, figures):
        return (-figures["error"],)

    def describe_training(self, figures):
        return f"near {figures['near']}"

    def describe_epoch(self, row):
        return f"error {row['val_error']}"

    def draw_curves(self, history, path):
        path.write_text("a picture")

    def write_samples(self, folder):
        pass

    def state_dict(self):
        return {"unit": "brightness"}

    def load_state_dict(self, state):
        if state["unit"] != "brightness":
            raise ValueError("another unit")


def test_the_trainer_trains_saves_and_resumes_a_task_that_it_does_not_know(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.TASKS, "classification", Brightness)
    config = tiny_config(epochs=2, ema_decay=None)
    trainer = Trainer(config, RunFolder(tmp_path))
    best = trainer.fit()
    assert set(best) == {"epoch", "weights", "error"}
    rows = read_table(tmp_path / "summary.csv")
    assert list(rows[0])[:8] == [
        *("epoch", "step", "lr", "train_loss", "train_near", "val_loss", "val_error", "ema_loss"),
    ]
    assert min(float(row["val_error"]) for row in rows) == best["error"]
    saved = load_checkpoint(tmp_path / "last.pth")
    assert saved["unit"] == "brightness"
    resumed = Trainer(config, RunFolder(tmp_path))
    resumed.resume()
    assert resumed.position == trainer.position


def test_samples_are_the_held_out_images_pixel_for_pixel(tmp_path):
    held_out = load_digits((16, 16), 1)[1]
    paths = write_samples(tmp_path / "samples", held_out, CLASS_NAMES)
    assert len(paths) == 10
    for path in paths:
        name, index = path.stem.split("_")
        assert held_out.labels[int(index)] == int(name)
        pixels = torch.tensor(list(Image.open(path).tobytes()), dtype=torch.uint8).view(1, 16, 16)
        assert torch.equal(pixels, held_out.images[int(index)])


def test_curves_are_drawn_for_one_epoch_and_for_many(tmp_path):
    for history in ([ROW], [{**ROW, "epoch": epoch, "ema_loss": 1.0, "ema_top1": 80.0} for epoch in range(1, 6)]):
        draw_curves(history, tmp_path / "curves.png", "a title")
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
