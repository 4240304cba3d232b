"""Residual addition and RMSNorm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import assert_close, assert_same_gradients
from vim.ops import add_rms_norm, available_backends

BACKENDS = available_backends("add_rms_norm")


def _normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 7, 24), (1, 1, 1), (3, 17), (33,), (2, 197, 192)], ids=str)
def test_matches_torch(shape, backend):
    x, residual, weight = _normal(*shape), _normal(*shape, seed=1), _normal(shape[-1], seed=2)
    for r in (residual, None):
        y, total = add_rms_norm(x, r, weight, 1e-5, backend=backend)
        expected_total = x if r is None else x + r
        expected = F.rms_norm(expected_total, shape[-1:], weight, 1e-5)
        assert_close(total, expected_total, 1e-7)
        assert_close(y, expected, 1e-6)
        leaves = [x, weight] if r is None else [x, r, weight]
        assert_same_gradients(torch.stack([y, total]), torch.stack([expected, expected_total]), leaves, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_residual_alone(backend):
    x, residual, weight = _normal(2, 9, 8), _normal(2, 9, 8, seed=1), _normal(8, seed=2)
    _, total = add_rms_norm(x, residual, weight, backend=backend)
    dx, dresidual = torch.autograd.grad(total.sum(), [x, residual])
    assert torch.equal(dx, torch.ones_like(x))
    assert torch.equal(dresidual, torch.ones_like(x))


def test_gradcheck_reference():
    tensors = (_normal(2, 3, 5, dtype=torch.float64), _normal(2, 3, 5, dtype=torch.float64, seed=1))
    weight = _normal(5, dtype=torch.float64, seed=2)
    assert torch.autograd.gradcheck(lambda *a: add_rms_norm(*a, 1e-3, backend="reference"), (*tensors, weight))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor"),
        ({"x": torch.zeros(2, 5, dtype=torch.int32)}, TypeError, "x must be float32.*int32"),
        ({"x": torch.zeros(2, 0)}, ValueError, r"x must be .*\(2, 0\)"),
        ({"x": torch.zeros(())}, ValueError, "x must be "),
        ({"weight": torch.zeros(4)}, ValueError, r"weight .*\(5,\).*\(4,\)"),
        ({"residual": torch.zeros(3, 5)}, ValueError, r"residual .*\(2, 5\).*\(3, 5\)"),
        ({"eps": None}, TypeError, "eps must be a number > 0, got None"),
        ({"eps": 0.0}, ValueError, "eps must be > 0, got 0.0"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        add_rms_norm(**{"x": torch.zeros(2, 5), "residual": None, "weight": torch.ones(5), **changes})
