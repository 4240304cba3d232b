"""The scans of both directions: against single scans, gradients, registration with torch, bad input."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import TOLERANCES, assert_close, gradients, make_bidirectional_inputs
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
    for name, got, wanted in zip(names, gradients(actual, tensors), gradients(expected, tensors), strict=True):
        assert_close(got, wanted, 5e-5, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    """Neither forward nor where gradients are computed within the region."""
    tensors = make_bidirectional_inputs(2, 33, 8, 4, 3)
    expected = _scan(tensors, backend=backend)
    wanted = gradients(expected, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        actual = _scan(tensors, backend=backend)
        grads = gradients(actual, tensors)
    assert torch.equal(actual, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


@pytest.mark.parametrize("every", [64, 2], ids=["one chunk", "chunks of 2"])
def test_gradcheck_reference(every):
    tensors = make_bidirectional_inputs(2, 5, 3, 2, 2, dtype=torch.float64)
    op = torch.ops.vim.bidirectional_scan_reference
    assert torch.autograd.gradcheck(lambda *a: op(*a, 0.5, every)[0], tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_directions_reach_the_output(backend):
    """The first token sees the last one and the last the first: no path may drop a direction."""
    tensors = make_bidirectional_inputs(1, 33, 8, 4, 2)
    y = _scan(tensors, backend=backend)
    at_start = torch.autograd.grad(y[0, 0].sum(), tensors, retain_graph=True)
    at_end = torch.autograd.grad(y[0, -1].sum(), tensors)
    u, u_b = 0, 6
    assert at_start[u][0, 1:].abs().max() == 0
    assert at_start[u_b][0, -1].abs().max() > 0
    assert at_end[u_b][0, :-1].abs().max() == 0
    assert at_end[u][0, 0].abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_directions_may_share_tensors(backend):
    """v1 mixers scan the same operands both ways, with another decay."""
    tensors = make_bidirectional_inputs(2, 19, 6, 4, 2)
    shared = [*tensors[:6], *tensors[:4], tensors[10], tensors[5], tensors[12]]
    leaves = [*tensors[:6], tensors[10], tensors[12]]
    actual, expected = _scan(shared, "sum", backend), _by_single_scans(shared, "sum")
    assert_close(actual, expected, 5e-6)
    for got, wanted in zip(gradients(actual, leaves), gradients(expected, leaves), strict=True):
        assert_close(got, wanted, 5e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_is_computed_in_float32_and_rounded_once(dtype, backend):
    tensors = make_bidirectional_inputs(2, 66, 24, 16, 3, dtype=dtype)
    wide = [t.detach().float().requires_grad_() for t in tensors]
    actual, expected = _scan(tensors, backend=backend), _scan(wide, backend="reference")
    assert actual.dtype == dtype
    assert_close(actual, expected, TOLERANCES[dtype].value / 2)
    for i, (got, wanted) in enumerate(zip(gradients(actual, tensors), gradients(expected, wide), strict=True)):
        assert got.dtype == tensors[i].dtype
        assert_close(got, wanted, TOLERANCES[dtype].gradient, str(i))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_and_strided_operands(backend):
    tensors = make_bidirectional_inputs(2, 21, 6, 4, 3)
    expected = _scan(tensors, backend=backend)
    padded = list(tensors)
    for i in (1, 7):  # rows of x_dbl padded to 16 numbers
        padded[i] = torch.cat([tensors[i], torch.full((2, 21, 5), float("nan"))], -1)[..., :11]
    for i in (0, 6):
        padded[i] = tensors[i].mT.contiguous().mT
    padded[12] = torch.cat([tensors[12]] * 2, -1)[..., 6:]
    assert_close(_scan(padded, backend=backend), expected, 1e-6)


@pytest.mark.parametrize("family", ["bidirectional_scan", "bidirectional_scan_reference"])
@pytest.mark.parametrize("every", [0, 3])
def test_opcheck(family, every):
    tensors = make_bidirectional_inputs(2, 5, 3, 2, 2)
    torch.library.opcheck(getattr(torch.ops.vim, family).default, (*tensors, 0.5, every))


def test_gradient_without_entry_states():
    tensors = make_bidirectional_inputs(2, 70, 3, 2, 2, dtype=torch.float64)
    lazy, eager = (torch.ops.vim.bidirectional_scan(*tensors, 0.5, every)[0] for every in (0, 16))
    for actual, expected in zip(gradients(lazy, tensors), gradients(eager, tensors), strict=True):
        assert_close(actual, expected, 1e-12)


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
