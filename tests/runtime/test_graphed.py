"""CUDA graphs of models, as far as they go without a GPU; tests/gpu has the rest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vim
from vim.runtime.graphed import Graphed


def test_each_call_runs_on_its_own_input_and_returns_new_tensors():
    x, y = torch.zeros(2, 3), torch.zeros(2, 3)
    call = Graphed(x, {"y": (y,)}, lambda: y.copy_(2 * x))
    first, second = (call(torch.full((2, 3), float(value), requires_grad=True))["y"][0] for value in (1, 2))
    assert (first.unique().item(), second.unique().item()) == (2, 4)
    assert not first.requires_grad


@pytest.mark.parametrize(
    ("x", "got"),
    [(torch.zeros(1, 3), r"\(1, 3\) float32 on cpu"), (torch.zeros(2, 3).half(), r"\(2, 3\) float16 on cpu")],
)
def test_another_input_than_the_example_is_refused(x, got):
    call = Graphed(torch.zeros(2, 3), None, lambda: None)
    with pytest.raises(ValueError, match=rf"must be like the example, \(2, 3\) float32 on cpu; got {got}"):
        call(x)


def test_without_a_gpu_the_model_is_to_be_called_itself():
    with pytest.raises(ValueError, match="example must be on a GPU, got cpu; without one, call the model itself"):
        vim.graphed(nn.Linear(3, 3).eval(), torch.zeros(2, 3))
