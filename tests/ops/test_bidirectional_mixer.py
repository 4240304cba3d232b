"""The inner block: same numbers as its parts, and no convolution kept for the backward pass."""

from __future__ import annotations

import sys
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.helpers import assert_close
from vim.ops import InnerWeights, bidirectional_mixer
from vim.ops.bidirectional_conv1d.interface import bidirectional_conv1d, run_bidirectional_conv1d
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
    """The same without any promise."""
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


def _watch_convolutions(monkeypatch) -> list[weakref.ref]:
    """Weak references to every convolution output that `bidirectional_mixer` makes."""
    module, seen = sys.modules["vim.ops.bidirectional_mixer"], []

    def watched(*args, **kwargs):
        results = run_bidirectional_conv1d(*args, **kwargs)
        seen.extend(weakref.ref(result) for result in results)
        return results

    monkeypatch.setattr(module, "run_bidirectional_conv1d", watched)
    return seen


def test_the_convolutions_are_not_kept(inputs, monkeypatch):
    seen = _watch_convolutions(monkeypatch)
    y = _run(*inputs)
    assert len(seen) == 2
    assert all(ref() is None for ref in seen), "a convolution output is alive between forward and backward"
    y.sum().backward()
    assert len(seen) == 4, "the backward pass convolves once more, not more often"
    assert all(ref() is None for ref in seen)


def test_what_is_kept_is_xz_and_little_else(inputs):
    """Bytes that the graph holds between forward and backward, beside the weights."""
    xz, forward, backward = inputs
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    module = sys.modules["vim.ops.bidirectional_mixer"]
    original = module._Recomputation.pack

    def watched(self, tensor):
        packed = original(self, tensor)
        if isinstance(packed, torch.Tensor):
            pack(packed)
        return packed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Recomputation, "pack", watched)
        _run(xz, forward, backward)
    weights = {t.untyped_storage().data_ptr() for t in _leaves(*inputs)[1:]}
    held = sum(size for pointer, size in kept.items() if pointer not in weights)
    tokens = 2 * 33
    projections = 2 * tokens * (RANK + 2 * STATES) * 4
    entry_states = 2 * 2 * DIM * STATES * 4
    assert held <= xz.numel() * 4 + projections + entry_states + 64


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
    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace operation"):
        y.sum().backward()


def test_under_activation_checkpointing_the_callers_hooks_decide(inputs, monkeypatch):
    seen = _watch_convolutions(monkeypatch)
    _assert_same_gradients(inputs, lambda *a: checkpoint(_run, *a, use_reentrant=False))
    assert len(seen) == 4, "once in the forward pass, once when the block is recomputed"


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


def test_no_gradients_no_promises(inputs, monkeypatch):
    monkeypatch.setattr(sys.modules["vim.ops.bidirectional_mixer"]._Recomputation, "__init__", None)
    with torch.no_grad():
        _run(*inputs)


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
