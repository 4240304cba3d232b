"""The depthwise convolutions, one direction and both."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import assert_close, assert_same_gradients
from vim.ops import available_backends, bidirectional_conv1d, causal_conv1d

ONE, BOTH = available_backends("causal_conv1d"), available_backends("bidirectional_conv1d")


def _normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()


def _by_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, reverse: bool) -> torch.Tensor:
    """The same by PyTorch's convolution, with flips."""
    x = x.flip(-1) if reverse else x
    out = F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=x.shape[1])
    return out.flip(-1) if reverse else out


@pytest.mark.parametrize("backend", ONE)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize(("width", "seqlen"), [(4, 1), (4, 3), (4, 37), (1, 5), (3, 64), (7, 4)])
def test_one_direction_matches_torch(width, seqlen, activation, reverse, backend):
    x, weight, bias = _normal(2, 5, seqlen), _normal(5, width), _normal(5)
    for b in (bias, None):
        expected = _by_torch(x, weight, b, reverse)
        expected = expected if activation is None else F.silu(expected)
        actual = causal_conv1d(x, weight, b, activation, reverse=reverse, backend=backend)
        assert_close(actual, expected, 1e-6)
        leaves = [x, weight] if b is None else [x, weight, b]
        assert_same_gradients(actual, expected, leaves, 5e-6)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize(("width", "width_b", "seqlen"), [(4, 4, 1), (4, 4, 37), (3, 5, 6), (1, 4, 197)])
def test_both_directions_match_torch(width, width_b, seqlen, backend):
    x = _normal(2, seqlen, 10)[..., :5]  # half of a wider tensor, as in the mixer
    weights = [_normal(5, width), _normal(5), _normal(5, width_b, seed=1), _normal(5, seed=1)]
    for bias, bias_b in ((weights[1], weights[3]), (None, weights[3]), (None, None)):
        out, out_b = bidirectional_conv1d(x, weights[0], bias, weights[2], bias_b, backend=backend)
        expected = F.silu(_by_torch(x.mT, weights[0], bias, False)).mT
        expected_b = F.silu(_by_torch(x.mT, weights[2], bias_b, True)).mT
        assert_close(out, expected, 1e-6)
        assert_close(out_b, expected_b, 1e-6)
        assert out.is_contiguous()
        assert out_b.is_contiguous()
        leaves = [t for t in (x, weights[0], bias, weights[2], bias_b) if t is not None]
        assert_same_gradients(torch.stack([out, out_b]), torch.stack([expected, expected_b]), leaves, 5e-6)


@pytest.mark.parametrize("backend", BOTH)
def test_gradient_of_one_output_alone(backend):
    x, weights = _normal(2, 9, 5), [_normal(5, 4), None, _normal(5, 4, seed=1), None]
    out, out_b = bidirectional_conv1d(x, *weights, backend=backend)
    (alone,) = torch.autograd.grad(out_b.sum(), x, retain_graph=True)
    (both,) = torch.autograd.grad((out + out_b).sum(), x)
    (other,) = torch.autograd.grad(bidirectional_conv1d(x, *weights, backend=backend)[0].sum(), x)
    assert_close(alone + other, both, 1e-5)


def test_gradcheck_reference():
    x, xt = _normal(2, 5, 3, dtype=torch.float64), _normal(2, 3, 5, dtype=torch.float64)
    w, b = _normal(3, 4, dtype=torch.float64), _normal(3, dtype=torch.float64)
    w_b, b_b = _normal(3, 2, dtype=torch.float64), _normal(3, dtype=torch.float64, seed=1)
    assert torch.autograd.gradcheck(lambda *a: bidirectional_conv1d(*a, backend="reference"), (x, w, b, w_b, b_b))
    for reverse in (False, True):
        assert torch.autograd.gradcheck(
            lambda *a, r=reverse: causal_conv1d(*a, "silu", reverse=r, backend="reference"), (xt, w, b)
        )


def test_layout_of_the_output_follows_the_input():
    x, w = _normal(2, 7, 5), _normal(5, 4)
    assert causal_conv1d(x.mT, w).mT.is_contiguous()
    assert causal_conv1d(x.mT.contiguous(), w).is_contiguous()


def test_flops():
    with FlopCounterMode(display=False) as counter:
        bidirectional_conv1d(_normal(2, 7, 5), _normal(5, 4), None, _normal(5, 4), None)
    assert counter.get_total_flops() == 2 * 2 * 2 * 7 * 5 * 4


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2, 5)}, ValueError, r"x must be \(batch, dim, len\), got shape \(2, 5\)"),
        ({"x": torch.zeros(2, 5, 0)}, ValueError, "x must have at least one token"),
        ({"x": None}, TypeError, "x must be a tensor"),
        ({"weight": torch.zeros(4, 4)}, ValueError, r"weight .*\(5, 4\).*\(4, 4\)"),
        ({"weight": torch.zeros(5, 1, 4)}, ValueError, "weight .*"),
        ({"weight": torch.zeros(5, 0)}, ValueError, "weight must have at least one tap"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias .*\(5,\).*\(4,\)"),
        ({"activation": "relu"}, ValueError, r"activation must be one of \[None, 'silu', 'swish'\], got 'relu'"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        causal_conv1d(**{"x": torch.zeros(2, 5, 7), "weight": torch.zeros(5, 4), **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2, 5)}, ValueError, r"x must be \(batch, len, dim\)"),
        ({"weight_b": torch.zeros(4, 4)}, ValueError, r"weight_b .*\(5, 4\).*\(4, 4\)"),
        ({"bias_b": torch.zeros(5, device="meta")}, ValueError, "bias_b must be on the device of x, cpu, got meta"),
    ],
)
def test_bad_input_both(changes, error, message):
    good = {"x": torch.zeros(2, 7, 5), "weight": torch.zeros(5, 4), "bias": None}
    good |= {"weight_b": torch.zeros(5, 4), "bias_b": None}
    with pytest.raises(error, match=message):
        bidirectional_conv1d(**{**good, **changes})
