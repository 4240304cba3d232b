"""A run killed by SIGKILL at a random moment and resumed ends as an unbroken one, to the bit.

`pytest tests/training/test_kill.py --kills 10` kills a classification ten times; without the option it is twice.
"""

from __future__ import annotations

import random
import time

import pytest
from rich.console import Console

from tests.coco_folder import plain_objects, write_split
from tests.processes import start
from tests.tasks.test_detection import config_for as detection_of
from tests.tasks.test_segmentation import config_of as segmentation_of
from tests.tiny_runs import read_table, tiny_config, write_image_folder, write_pairs
from tests.training.test_trainer import RANDOM, same
from vim.checkpoints.io import load_checkpoint
from vim.training.run_folder import RunFolder
from vim.training.trainer import Trainer


def run(config, folder):
    """Begin a run, or carry it on, and train to its end."""
    trainer = Trainer(config, RunFolder(folder), Console(quiet=True))
    trainer.resume()
    trainer.fit()


def results(folder):
    """What a run has computed, without its settings of saving and loading."""
    files = RunFolder(folder)
    checkpoints = [{**load_checkpoint(path), "config": None} for path in (files.last, files.best)]
    return [*checkpoints, read_table(files.summary), files.best_weights.read_bytes()]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_any_moment_ends_as_an_unbroken_one(tmp_path, workers, pytestconfig):
    images = write_image_folder(tmp_path / "images", ["ant", "bee"], {"train": 12, "val": 4}, (20, 20))
    config = tiny_config(
        **{"epochs": 3, "batch_size": 8, "micro_batch_size": 4, "save__steps": 1, "ema_decay": 0.9},
        **{"data__dataset": "folder", "data__path": str(images), "data__workers": workers, "model__in_chans": 3},
        **{**RANDOM, "augment__auto_augment": "rand-m9-mstd0.5-inc1"},
    )
    kill_and_resume(config, tmp_path, pytestconfig.getoption("kills") // 2, seed=workers)


SHORT = {"epochs": 3, "batch_size": 4, "micro_batch_size": 2, "save__steps": 1, "ema_decay": 0.9}


@pytest.mark.slow
def test_a_segmentation_that_is_killed_ends_as_an_unbroken_one(tmp_path):
    pairs = write_pairs(tmp_path / "pairs", {"train": 16, "val": 5})
    draws = {"model__drop_path_rate": 0.2, "segmentation__photometric": True, "augment__hflip": 0.5}
    kill_and_resume(segmentation_of(pairs, **SHORT, **draws), tmp_path, kills=3, seed=2)


@pytest.mark.slow
def test_a_detection_that_is_killed_ends_as_an_unbroken_one(tmp_path):
    write_split(tmp_path / "coco", "train2017", plain_objects(16), images=16)
    objects = write_split(tmp_path / "coco", "val2017", plain_objects(5, seed=1), images=5)
    kill_and_resume(detection_of(objects, **SHORT), tmp_path, kills=3, seed=3)


def kill_and_resume(config, tmp_path, kills, seed):
    """Kill a run at random moments, one in each folder, and compare what the resumed runs compute with a whole one."""
    began = time.monotonic()
    process = start(run, config, tmp_path / "unbroken")
    process.join(timeout=300)
    duration = time.monotonic() - began
    assert process.exitcode == 0
    expected = results(tmp_path / "unbroken")

    chance, places = random.Random(seed), []
    for number in range(kills):
        folder = tmp_path / f"killed {number}"
        victim = start(run, config, folder)
        time.sleep(chance.uniform(0.1, 0.95) * duration)
        victim.kill()
        victim.join(timeout=60)
        last = RunFolder(folder).last
        places.append(load_checkpoint(last)["position"]["step"] if last.exists() else 0)
        survivor = start(run, config, folder)
        survivor.join(timeout=300)
        assert survivor.exitcode == 0
        assert same(expected, results(folder)), f"killed after step {places[-1]}"
        assert not list(folder.glob(".*.tmp"))
    print(f"killed after the steps {places} of {expected[0]['position']['step']}")
