"""The CUDA kernels of the convolutions and the norm, run on the host, against the reference."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import emulated
from tests.helpers import assert_close
from tests.ops.kernel_checks import FLOATS, KernelChecks, noise, run_op

LIBRARY = emulated.load()
checks = KernelChecks(emulated.SUFFIX)
set_thread_order = ctypes.CDLL(str(LIBRARY)).vim_emulation_order


def check(op: str, *args: object) -> tuple[torch.Tensor, ...]:
    """The kernel must agree with the reference, in the same bits in every order of threads; returns the reference's."""
    expected = checks.check(op, *args)
    results = []
    for order in range(3):
        set_thread_order(order)
        results.append(run_op(op + emulated.SUFFIX, *args))
    set_thread_order(0)
    for i, (first, *others, wanted) in enumerate(zip(*results, expected, strict=True)):
        assert first.is_contiguous() == wanted.is_contiguous(), f"{op} output {i}"
        assert all(torch.equal(first, other) for other in others), f"{op} output {i} depends on the order of threads"
    return expected


def check_both(x: torch.Tensor, *weights: torch.Tensor | None) -> None:
    check("bidirectional_conv1d", x, *weights)
    douts = [noise(*x.shape, dtype=x.dtype, seed=seed) for seed in (1, 2)]
    check("bidirectional_conv1d_backward", *douts, x, *weights)


def check_one(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, silu: bool, reverse: bool) -> None:
    out = check("causal_conv1d", x, weight, bias, silu, reverse)[0]
    dout = torch.empty_like(out).copy_(noise(*x.shape, dtype=x.dtype, seed=1))
    check("causal_conv1d_backward", dout, x, weight, bias, silu, reverse)


def weights_of(dim: int, width: int, width_b: int) -> list[torch.Tensor]:
    return [noise(dim, width), noise(dim), noise(dim, width_b, seed=3), noise(dim, seed=3)]


# 4 channels at a time forward and 2 backward, 64 in a block; pieces of 8 tokens.
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("batch", "seqlen", "dim"), [(1, 1, 4), (2, 9, 12), (1, 37, 68), (3, 8, 130), (1, 7, 5)])
def test_both_directions(batch, seqlen, dim, dtype):
    check_both(noise(batch, seqlen, 2 * dim, dtype=dtype)[..., :dim], *weights_of(dim, 4, 4))


@pytest.mark.parametrize("widths", [(4, 3), (1, 2), (5, 7)])
def test_other_widths(widths):
    check_both(noise(2, 11, 8), *weights_of(8, *widths))


@pytest.mark.parametrize("biases", [(None, None), (0, None), (None, 0)])
def test_without_bias(biases):
    weight, bias, weight_b, bias_b = weights_of(8, 4, 4)
    check_both(noise(2, 11, 8), weight, bias if biases[0] == 0 else None, weight_b, bias_b if biases[1] == 0 else None)


@pytest.mark.parametrize("start", [1, 2, 4])
def test_unaligned(start):
    """Vectors start where the memory allows it: elsewhere the general kernels run."""
    check_both(noise(2, 11, 40, dtype=torch.bfloat16)[:, :, start : start + 16], *weights_of(16, 4, 4))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_one_direction(dtype, silu, reverse):
    for dim, seqlen in ((8, 19), (5, 1)):
        x = noise(2, seqlen, dim, dtype=dtype)
        weight, bias, narrow, _ = weights_of(dim, 4, 3)
        check_one(x.mT, weight, bias, silu, reverse)
        check_one(x.mT.contiguous(), narrow, None, silu, reverse)


def test_nothing():
    weight, bias, *_ = weights_of(8, 4, 4)
    check_both(noise(0, 5, 8), weight, bias, weight, bias)
    check("add_rms_norm", noise(0, 8), None, bias, 1e-5)
    check("add_rms_norm_backward", noise(0, 8), None, noise(0, 8), bias, 1e-5)


# A warp takes a row of up to 256, 512 or 1024 numbers, four at a time; 1056 are read twice and 33 one at a time.
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 24), (3, 3, 192), (9, 384), (2, 768), (3, 1056), (40, 33), (70, 8)], ids=str
)
def test_norm(shape, dtype):
    x, residual, weight = noise(*shape, dtype=dtype), noise(*shape, seed=2), noise(shape[-1])
    for added in (residual, None):
        r = check("add_rms_norm", x, added, weight, 1e-5)[1]
    for dy, dr in ((x, residual), (x, None), (None, residual), (None, None)):
        check("add_rms_norm_backward", dy, dr, r, weight, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [192, 33, 1056])
def test_norm_with_a_weight_like_x(dim, dtype):
    """As it is in a model in half precision: read without a conversion before."""
    check("add_rms_norm", noise(3, dim, dtype=dtype), noise(3, dim), noise(dim, dtype=dtype, seed=2), 1e-5)


def test_norm_of_a_part_of_rows():
    x = noise(6, 48, dtype=torch.bfloat16)
    for part in (x[:, :24], x[:, 1:25], x[::2], x.view(2, 3, 48)[:, ::2]):
        check("add_rms_norm", part, None, noise(part.shape[-1]), 1e-5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    seqlen=st.integers(1, 33),
    dim=st.integers(3, 36),  # of one or two channels a sum over tokens may cancel
    width=st.sampled_from([1, 3, 4, 4, 4, 6]),
    width_b=st.sampled_from([2, 4, 4, 4]),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 9),
)
def test_random_shapes(batch, seqlen, dim, width, width_b, dtype, seed):
    x = noise(batch, seqlen, dim, dtype=dtype, seed=seed)
    check_both(x, *weights_of(dim, width, width_b))
    check_one(x.mT, *weights_of(dim, width, width_b)[:2], seed % 2 == 0, seed % 3 == 0)
    r = check("add_rms_norm", x, x.float(), noise(dim, seed=seed), 1e-5)[1]
    check("add_rms_norm_backward", x, r, r, noise(dim, seed=seed), 1e-5)


def test_mixed_dtypes_and_float64_go_to_the_reference():
    x, (weight, bias, *_) = noise(2, 9, 8).double(), weights_of(8, 4, 4)
    args = (x, weight.double(), bias.double(), weight.double(), bias.double())
    assert torch.equal(
        run_op("bidirectional_conv1d_emulated", *args)[0], run_op("bidirectional_conv1d_reference", *args)[0]
    )


def test_gradients_through_autograd():
    """The family is connected: what autograd gives is what the backward op gives."""
    x, weights = noise(2, 9, 8).requires_grad_(), [w.requires_grad_() for w in weights_of(8, 4, 4)]
    grads = []
    for family in ("_emulated", "_reference"):
        out, out_b = getattr(torch.ops.vim, f"bidirectional_conv1d{family}")(x, *weights)
        grads.append(torch.autograd.grad((out * out_b).sum(), [x, *weights]))
    for got, wanted in zip(*grads, strict=True):
        assert_close(got, wanted, 5e-6)
