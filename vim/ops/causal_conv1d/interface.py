"""`causal_conv1d`, the function for users."""

from __future__ import annotations

from torch import Tensor

from vim.ops.backends.registry import resolve_backend
from vim.ops.causal_conv1d import register as register
from vim.ops.common.checks import check_activation, check_choice, check_length, check_operand
from vim.ops.common.layout import accumulate_dtype, as_dtype


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    reverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Convolve each channel with its own causal filter.

        out[l] = activation(bias + sum_k weight[k] x[l - (width - 1) + k])

    Args:
        x: Input, (batch, dim, len); float32, bfloat16, float16 or float64. Any strides; the output is channel-last in
            memory where `x` is.
        weight: Filters, (dim, width).
        bias: Per channel, (dim,).
        activation: "silu" (or its other name "swish"), or `None`.
        reverse: Look at the tokens after each token instead of before it, without a flipped copy.
        backend: Name of a backend (see `available_backends`), or `None` for the fastest that applies.

    Returns:
        Same shape and dtype as `x`; arithmetic is float32 (float64 for float64 input).

    Raises:
        ValueError: A shape or device disagrees with `x`, `len` is 0, or `activation` is unknown.
        TypeError: An argument is not a floating tensor.
        RuntimeError: The named backend cannot run here, or the memory of an argument was freed; the message says why.

    Source: Gu and Dao 2023, arXiv:2312.00752, section 3.4; argument order of causal-conv1d's `causal_conv1d_fn`.
    """
    check_activation("x", x, "(batch, dim, len)")
    check_length("x", x.shape[-1])
    check_filter("weight", weight, x.shape[1], x)
    if bias is not None:
        check_operand("bias", bias, (x.shape[1],), "(dim,)", x, "x")
    check_choice("activation", activation, (None, "silu", "swish"))
    acc = accumulate_dtype(x.dtype)
    op = resolve_backend("causal_conv1d", backend, x)
    return op(x, *as_dtype(acc, ("weight", "bias"), (weight, bias)), activation is not None, reverse)


def check_filter(name: str, weight: Tensor, dim: int, x: Tensor) -> None:
    """Raise unless `weight` is (dim, width) with at least one tap, on the device of `x`."""
    width = weight.shape[1] if isinstance(weight, Tensor) and weight.dim() == 2 else 0
    check_operand(name, weight, (dim, width), "(dim, width)", x, "x")
    if width == 0:
        raise ValueError(f"{name} must have at least one tap, got shape {tuple(weight.shape)}")
