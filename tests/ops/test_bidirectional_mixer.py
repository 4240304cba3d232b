"""The inner block: the same numbers as its parts, with any module as x_proj."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.helpers import assert_close
from vim.ops import InnerWeights, bidirectional_mixer
from vim.ops.bidirectional_conv1d.interface import bidirectional_conv1d
from vim.ops.bidirectional_scan.interface import ScanOperands, bidirectional_scan

DIM, RANK, STATES = 6, 2, 4


def _weights(seed: int) -> InnerWeights:
    torch.manual_seed(seed)
    return InnerWeights(
        nn.Parameter(torch.randn(DIM, 4)),
        nn.Parameter(torch.randn(DIM)),
        nn.Linear(DIM, RANK + 2 * STATES, bias=False),
        nn.Parameter(torch.randn(DIM, RANK)),
        nn.Parameter(torch.randn(DIM)),
        nn.Parameter(torch.randn(DIM, STATES) * 0.3),
        nn.Parameter(torch.randn(DIM)),
    )


@pytest.fixture
def inputs() -> tuple[torch.Tensor, InnerWeights, InnerWeights]:
    torch.manual_seed(0)
    return torch.randn(2, 33, 2 * DIM, requires_grad=True), _weights(1), _weights(2)


def _run(xz: torch.Tensor, forward: InnerWeights, backward: InnerWeights) -> torch.Tensor:
    return bidirectional_mixer(*xz.chunk(2, -1), forward, backward)


def _plain(xz: torch.Tensor, forward: InnerWeights, backward: InnerWeights) -> torch.Tensor:
    """The same by its parts."""
    x, z = xz.chunk(2, -1)
    conv = forward.conv_weight, forward.conv_bias, backward.conv_weight, backward.conv_bias
    scans = [
        ScanOperands(u, w.x_proj(u), *w[3:])
        for u, w in zip(bidirectional_conv1d(x, *conv), (forward, backward), strict=True)
    ]
    return bidirectional_scan(*scans, z)


def _leaves(xz: torch.Tensor, *weights: InnerWeights) -> list[torch.Tensor]:
    return [xz, *(t for w in weights for t in (*w[:2], w.x_proj.weight, *w[3:]))]


def _assert_same_gradients(inputs, run) -> None:
    leaves = _leaves(*inputs)
    cotangent = torch.randn(2, 33, DIM)
    actual = torch.autograd.grad(run(*inputs), leaves, cotangent)
    for got, wanted in zip(actual, torch.autograd.grad(_plain(*inputs), leaves, cotangent), strict=True):
        assert_close(got, wanted, 1e-6)


def test_same_gradients_as_its_parts(inputs):
    _assert_same_gradients(inputs, _run)


def test_two_backward_passes_through_one_graph(inputs):
    y = _run(*inputs)
    leaves = _leaves(*inputs)
    first = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    for got, wanted in zip(torch.autograd.grad(y.sum(), leaves), first, strict=True):
        assert torch.equal(got, wanted)


def test_weights_changed_in_place_before_the_backward_pass_are_refused(inputs):
    y = _run(*inputs)
    with torch.no_grad():
        inputs[1].conv_weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_under_activation_checkpointing(inputs):
    _assert_same_gradients(inputs, lambda *a: checkpoint(_run, *a, use_reentrant=False))


def test_under_offloading_hooks(inputs):
    def offloaded(*args):
        with torch.autograd.graph.save_on_cpu():
            return _run(*args)

    _assert_same_gradients(inputs, offloaded)


def test_under_torch_func(inputs):
    xz, forward, backward = inputs
    grad = torch.func.grad(lambda t: _run(t, forward, backward).square().sum())(xz.detach())
    (expected,) = torch.autograd.grad(_plain(xz, forward, backward).square().sum(), xz)
    assert_close(grad, expected, 1e-5)
    each = torch.func.vmap(lambda t: _run(t[None], forward, backward)[0])(xz.detach())
    assert_close(each, _plain(xz, forward, backward), 1e-5)


def test_compiles_without_graph_breaks(inputs):
    _assert_same_gradients(inputs, torch.compile(_run, fullgraph=True, backend="aot_eager"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"D": torch.zeros(5)}, r"backward weights must be for dim = 6 channels.*'D': \(5,\)"),
        ({"conv_weight": torch.zeros(5, 4)}, "backward weights must be for dim = 6 channels"),
        ({"dt_weight": torch.zeros(6, 3)}, "backward weights must be for dim = 6 channels"),
        ({"A_log": torch.zeros(6, 5)}, r"backward.A_log must be \(dim, d_state\) = \(6, 4\), got \(6, 5\)"),
        ({"x_proj": nn.Linear(6, 11)}, r"x_proj must make dt_rank \+ 2 d_state = 10 numbers a token, got 11"),
    ],
)
def test_sizes_that_do_not_belong_together(inputs, change, message):
    xz, forward, backward = inputs
    with pytest.raises(ValueError, match=message):
        _run(xz, forward, backward._replace(**change))
    with pytest.raises(ValueError, match="z must be like x"):
        bidirectional_mixer(xz[..., :6], xz[..., :5], forward, backward)
    with pytest.raises(ValueError, match="merge must be one of"):
        bidirectional_mixer(*xz.chunk(2, -1), forward, backward, "max")
