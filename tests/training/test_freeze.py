"""What is frozen does not learn, is in evaluation mode, and learns later if asked to."""

from __future__ import annotations

import copy

import pytest
from rich.console import Console
from torch import nn

from tests.processes import run_together
from tests.tiny_runs import tiny_config
from vim.models.build import build_model
from vim.runtime.distributed import join_processes
from vim.training.freeze import Freezer
from vim.training.run_folder import RunFolder
from vim.training.trainer import Trainer

PROBE = {"optim__trainable": ("head.*",), "optim__weight_decay": 0.1, "optim__lr": 1e-2}


def weights_by_epoch(config, folder):
    """The weights at the start and after every epoch."""
    with join_processes() as processes:
        trainer = Trainer(config, RunFolder(folder), Console(quiet=True), processes)
        states = {}
        choose = trainer.schedule.set

        def watch(epoch, step):
            if epoch not in states:
                states[epoch] = copy.deepcopy(trainer.model.state_dict())
            return choose(epoch, step)

        trainer.schedule.set = watch
        trainer.fit()
        return [
            {name: tensor.numpy() for name, tensor in s.items()} for s in (*states.values(), trainer.model.state_dict())
        ]


def moved(before, after):
    return {name for name in before if (before[name] != after[name]).any()}


def test_a_linear_probe_changes_the_head_alone(tmp_path):
    first, second, third = weights_by_epoch(tiny_config(epochs=2, **PROBE), tmp_path)
    assert moved(first, second) == moved(second, third) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_frozen_backbone_learns_after_its_epochs(tmp_path, processes):
    config = tiny_config(epochs=2, optim__unfreeze_after=1, **PROBE)
    results = run_together(processes, weights_by_epoch, config, tmp_path)
    first, second, third = results[0]
    assert moved(first, second) == {"head.weight", "head.bias"}
    assert moved(second, third) == set(first)
    if processes == 2:
        assert not moved(results[1][2], third)  # both have learned the same


def test_frozen_modules_are_in_evaluation_mode_and_the_others_are_not():
    model = nn.Sequential(
        nn.Sequential(nn.Linear(2, 2), nn.Dropout()), nn.BatchNorm1d(2), nn.Dropout(), nn.Linear(2, 2)
    )
    freezer = Freezer(model, tiny_config(optim__trainable=("3.*",), optim__unfreeze_after=2).optim)
    assert freezer.begin_epoch(0)
    assert not freezer.begin_epoch(1)
    frozen, norm, dropout, head = model
    assert [module.training for module in (frozen, frozen[1], norm, dropout, head, model)] == [
        *(False, False, False),
        *(True, True, True),
    ]
    assert freezer.learning(1) == 6
    assert freezer.begin_epoch(2)
    assert all(module.training for module in model.modules())
    assert freezer.learning(2) == 6 + 6 + 4


def test_a_pattern_that_names_no_parameter_is_refused():
    model = build_model(tiny_config().model, 10)
    with pytest.raises(
        ValueError, match=r"optim.trainable must name parameters of the model, such as 'norm_f.weight', got"
    ):
        Freezer(model, tiny_config(optim__trainable=("head.*", "backbone.*")).optim)
    assert all(parameter.requires_grad for parameter in model.parameters())
