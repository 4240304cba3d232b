"""`add_rms_norm`, the function for users."""

from __future__ import annotations

from torch import Tensor

from vim.ops.add_rms_norm import register as register
from vim.ops.backends.registry import resolve_backend
from vim.ops.common.checks import check_floating, check_operand, check_tensor
from vim.ops.common.eager import needs_grad
from vim.ops.common.layout import accumulate_dtype, as_dtype


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-5, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Add a residual and normalise the sum by its root mean square over the last axis.

        r = x + residual;    y = r / sqrt(mean(r^2) + eps) * weight

    Args:
        x: Input, (..., dim); float32, bfloat16, float16 or float64. Any strides.
        residual: Like `x`, in any floating dtype (float32 in a model); `None` where there is none yet.
        weight: Scale, (dim,).
        eps: Added to the mean square, > 0.
        backend: Name of a backend (see `available_backends`), or `None` for the fastest that applies.

    Returns:
        y in the dtype of `x`, and r in float32 (float64 for float64 input): the residual of the next block.

    Raises:
        ValueError: A shape or device disagrees with `x`, `dim` is 0, or `eps` is not positive.
        TypeError: An argument is not a floating tensor, or `eps` is not a number.
        RuntimeError: The named backend cannot run here, or the memory of an argument was freed; the message says why.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """
    check_floating("x", check_tensor("x", x, "(..., dim)"))
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be (..., dim) with dim > 0, got shape {tuple(x.shape)}")
    check_operand("weight", weight, (x.shape[-1],), "(dim,)", x, "x")
    if residual is not None:
        check_operand("residual", residual, x.shape, "(..., dim)", x, "x")
    if not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number > 0, got {eps!r}")
    if not eps > 0:
        raise ValueError(f"eps must be > 0, got {eps}")
    acc = accumulate_dtype(x.dtype)
    weight_to_convert = None if _takes_weight_in_dtype_of_x(x, residual, weight) else weight
    residual, converted = as_dtype(acc, ("residual", "weight"), (residual, weight_to_convert))
    return resolve_backend("add_rms_norm", backend, x)(x, residual, weight if converted is None else converted, eps)


def _takes_weight_in_dtype_of_x(x: Tensor, residual: Tensor | None, weight: Tensor) -> bool:
    """Return True if kernels take the weight in the dtype of `x`, which saves its conversion in inference on a GPU."""
    return x.is_cuda and weight.dtype is x.dtype and not needs_grad(x, residual, weight)
