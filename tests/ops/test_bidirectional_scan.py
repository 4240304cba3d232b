"""The scans of both directions: against single scans, gradients, registration with torch, bad input."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import assert_close, assert_same_gradients, make_bidirectional_inputs
from vim.ops import ScanOperands, available_backends, bidirectional_scan, selective_scan

BACKENDS = available_backends("bidirectional_scan")


def _scan(tensors: list[torch.Tensor], merge: str = "mean", backend: str | None = None) -> torch.Tensor:
    forward, backward = ScanOperands(*tensors[:6]), ScanOperands(*tensors[6:12])
    return bidirectional_scan(forward, backward, tensors[12], merge, backend=backend)


def _by_single_scans(tensors: list[torch.Tensor], merge: str) -> torch.Tensor:
    """The same from two reference scans, the second over flipped sequences."""
    z, total = tensors[12], 0
    for operands, flip in ((tensors[:6], False), (tensors[6:12], True)):
        u, x_dbl, dt_weight, dt_bias, A_log, D = operands
        activations = [t.flip(1) if flip else t for t in (u, x_dbl, z)]
        dt, B, C = activations[1].split([dt_weight.shape[1], A_log.shape[1], A_log.shape[1]], -1)
        delta = (dt @ dt_weight.T).mT
        u, z_dir = activations[0].mT, activations[2].mT
        A = -torch.exp(A_log)
        y = selective_scan(u, delta, A, B.mT, C.mT, D, z_dir, dt_bias, True, backend="reference").mT
        total = total + (y.flip(1) if flip else y)
    return total / 2 if merge == "mean" else total


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("merge", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 3, 5, 4, 2), (2, 65, 24, 16, 3), (1, 197, 48, 16, 12)], ids=str)
def test_matches_single_scans(shape, merge, backend):
    tensors = make_bidirectional_inputs(*shape)
    actual, expected = _scan(tensors, merge, backend), _by_single_scans(tensors, merge)
    assert actual.is_contiguous()
    assert_close(actual, expected, 5e-6)
    names = ["u", "x_dbl", "dt_weight", "dt_bias", "A_log", "D"]
    names = [*names, *(f"{name}_b" for name in names), "z"]
    assert_same_gradients(actual, expected, tensors, 5e-5, names)


def test_autocast_changes_nothing_where_torch_func_transforms_the_scan():
    """The reference runs there without the dispatcher, which would turn autocast off."""
    tensors = [t.detach() for t in make_bidirectional_inputs(2, 9, 6, 4, 3)]
    inputs = torch.stack([tensors[0], tensors[0].flip(1)])
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.func.vmap(lambda u: _scan([u, *tensors[1:]]))(inputs)
    for got, u in zip(actual, inputs, strict=True):
        assert_close(got, _scan([u, *tensors[1:]]), 2e-6)


@pytest.mark.parametrize("every", [64, 2], ids=["one chunk", "chunks of 2"])
def test_gradcheck_reference(every):
    tensors = make_bidirectional_inputs(2, 5, 3, 2, 2, dtype=torch.float64)
    op = torch.ops.vim.bidirectional_scan_reference
    assert torch.autograd.gradcheck(lambda *a: op(*a, 0.5, every)[0], tensors)


def test_flops_are_two_scans_and_two_projections():
    tensors = make_bidirectional_inputs(2, 19, 6, 4, 3)
    with FlopCounterMode(display=False) as counter:
        y = _scan(tensors)
    forward = 2 * (9 * 2 * 19 * 6 * 4 + 2 * 2 * 19 * 6 * 3)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, torch.zeros(2, 5), ValueError, r"forward.u must be \(batch, len, dim\)"),
        (0, torch.zeros(2, 0, 3), ValueError, "forward.u must have at least one token"),
        (0, None, TypeError, "forward.u must be a tensor"),
        (1, torch.zeros(2, 5, 7), ValueError, r"forward.x_dbl .*\(2, 5, 6\).*\(2, 5, 7\)"),
        (1, torch.zeros(2, 5, 6, dtype=torch.float16), ValueError, "forward.x_dbl must have the dtype of forward.u"),
        (2, torch.zeros(3, 0), ValueError, r"forward.dt_weight must be .*\(3, 0\)"),
        (4, torch.zeros(4, 2), ValueError, r"forward.A_log .*\(3, 2\).*\(4, 2\)"),
        (6, torch.zeros(2, 4, 3), ValueError, r"backward.u .*\(2, 5, 3\).*\(2, 4, 3\)"),
        (9, torch.zeros(4), ValueError, r"backward.dt_bias .*\(3,\).*\(4,\)"),
        (11, torch.zeros(3, device="meta"), ValueError, "backward.D must be on the device of forward.u, cpu, got meta"),
        (12, torch.zeros(2, 5, 4), ValueError, r"z .*\(2, 5, 3\).*\(2, 5, 4\)"),
    ],
)
def test_bad_input(index, value, error, message):
    tensors = make_bidirectional_inputs(2, 5, 3, 2, 2)
    tensors[index] = value
    with pytest.raises(error, match=message):
        _scan(tensors)


def test_unknown_merge():
    with pytest.raises(ValueError, match=r"merge must be one of \['mean', 'sum'\], got 'max'"):
        _scan(make_bidirectional_inputs(2, 5, 3, 2, 2), "max")
