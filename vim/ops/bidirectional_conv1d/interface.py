"""`bidirectional_conv1d`, the function for users."""

from __future__ import annotations

from torch import Tensor

from vim.ops.backends.registry import resolve_backend
from vim.ops.bidirectional_conv1d import register as register
from vim.ops.causal_conv1d.interface import check_filter
from vim.ops.common.checks import check_activation, check_length, check_operand
from vim.ops.common.layout import accumulate_dtype, as_dtype


def bidirectional_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_b: Tensor,
    bias_b: Tensor | None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve each channel with a causal and an anti-causal filter, and apply SiLU, from one read of `x`.

        out[l]   = silu(bias   + sum_k weight[k]   x[l - (width - 1) + k])
        out_b[l] = silu(bias_b + sum_k weight_b[k] x[l + (width - 1) - k])

    Args:
        x: Input, (batch, len, dim); float32, bfloat16, float16 or float64. Any strides.
        weight, weight_b: Filters of the two directions, (dim, width) each; widths may differ.
        bias, bias_b: Per channel, (dim,), or `None`.
        backend: Name of a backend (see `available_backends`), or `None` for the fastest that applies.

    Returns:
        out and out_b, each contiguous, with the shape and dtype of `x`; arithmetic is float32 (float64 for float64
        input).

    Raises:
        ValueError: A shape or device disagrees with `x`, or `len` is 0.
        TypeError: An argument is not a floating tensor.
        RuntimeError: The named backend cannot run here, or the memory of an argument was freed; the message says why.

    Source: Zhu et al. 2024, arXiv:2401.09417, Algorithm 1, lines 5 to 7.
    """
    check_activation("x", x, "(batch, len, dim)")
    check_length("x", x.shape[1])
    dim = x.shape[2]
    for name, w in (("weight", weight), ("weight_b", weight_b)):
        check_filter(name, w, dim, x)
    for name, b in (("bias", bias), ("bias_b", bias_b)):
        if b is not None:
            check_operand(name, b, (dim,), "(dim,)", x, "x")
    return run_bidirectional_conv1d(x, weight, bias, weight_b, bias_b, backend=backend)


def run_bidirectional_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_b: Tensor,
    bias_b: Tensor | None,
    *,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Run `bidirectional_conv1d` on operands that are known to fit."""
    names = ("weight", "bias", "weight_b", "bias_b")
    weights = as_dtype(accumulate_dtype(x.dtype), names, (weight, bias, weight_b, bias_b))
    return resolve_backend("bidirectional_conv1d", backend, x)(x, *weights)
