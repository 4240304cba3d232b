"""Figures arrive in TensorBoard, Weights & Biases and MLflow, and a run that is carried on goes on in its record."""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from vim.training import trackers
from vim.training.trackers import check_trackers, open_trackers

SETTINGS = {"optim.lr": 0.1, "recipe": "digits"}


def write(names, folder, first_step, steps):
    opened = open_trackers(names, folder, SETTINGS, first_step)
    for step in steps:
        for tracker in opened:
            tracker.log({"step/loss": float(step)}, step)
    for tracker in opened:
        tracker.close()


def test_tensorboard_forgets_what_a_run_that_died_wrote_after_its_last_checkpoint(tmp_path, monkeypatch):
    # TensorBoard reads files in the order of their names: second, host, process, number. Runs of one process within a
    # second would be read 10 before 9.
    seconds = itertools.count(1)
    monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: float(next(seconds))))
    write(["tensorboard"], tmp_path, 0, [1, 2, 3, 4])
    write(["tensorboard"], tmp_path, 2, [3, 4, 5])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("step/loss")] == [(n, float(n)) for n in range(1, 6)]


@pytest.fixture
def fake(monkeypatch):
    """Stand-ins with the calls of the two libraries; returns what they were called with."""
    calls = []
    find = importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda n: n if n in ("wandb", "mlflow") else find(n))

    def init(**arguments):
        calls.append(("wandb.init", arguments))
        return SimpleNamespace(
            id=arguments["id"] or "w1",
            log=lambda figures, step: calls.append(("wandb.log", figures, step)),
            finish=lambda: calls.append(("wandb.finish",)),
        )

    wandb, mlflow = ModuleType("wandb"), ModuleType("mlflow")
    wandb.init = init

    def start_run(run_id, run_name):
        calls.append(("mlflow.start_run", run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "m1"))

    mlflow.start_run = start_run
    mlflow.log_params = lambda params: calls.append(("mlflow.log_params", params))
    mlflow.log_metrics = lambda figures, step: calls.append(("mlflow.log_metrics", figures, step))
    mlflow.end_run = lambda: calls.append(("mlflow.end_run",))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    return calls


def test_the_other_trackers_get_settings_and_figures_and_are_found_again(tmp_path, fake):
    write(["wandb", "mlflow"], tmp_path, 0, [1])
    first = list(fake)
    assert first[0][1] | {"dir": None} == {
        **{"project": "vimamba", "name": tmp_path.name, "dir": None, "config": SETTINGS, "id": None},
        "resume": "allow",
    }
    assert ("mlflow.start_run", None, tmp_path.name) in first
    assert ("mlflow.log_params", {"optim.lr": "0.1", "recipe": "digits"}) in first
    assert ("wandb.log", {"step/loss": 1.0}, 1) in first
    assert ("mlflow.log_metrics", {"step/loss": 1.0}, 1) in first
    assert json.loads((tmp_path / "trackers.json").read_text(encoding="utf-8")) == {"wandb": "w1", "mlflow": "m1"}
    fake.clear()
    write(["wandb", "mlflow"], tmp_path, 1, [2])
    assert fake[0][1]["id"] == "w1"
    assert ("mlflow.start_run", "m1", None) in fake
    assert not any(call[0] == "mlflow.log_params" for call in fake)


def test_a_tracker_that_is_not_installed_is_an_error_and_tensorboard_only_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"log.trackers names 'wandb', which is not installed: pip install"):
        check_trackers(["tensorboard", "wandb"])
    with caplog.at_level(logging.WARNING):
        assert open_trackers(["tensorboard"], tmp_path, SETTINGS) == []
    assert caplog.messages == ["tensorboard is not installed: no figures are written for it"]
