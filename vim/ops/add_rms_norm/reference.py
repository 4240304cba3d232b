"""Residual addition and RMSNorm in plain PyTorch: the specification of every other backend.

    r = x + residual
    y = r / sqrt(mean(r^2) + eps) * weight

over the last axis. r is float32 (float64 for float64 input) and is what the next block receives as its residual.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vim.ops.common.layout import accumulate_dtype


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return y in the dtype of `x`, and r."""
    acc = accumulate_dtype(x.dtype)
    r = x.to(acc, copy=True) if residual is None else x + residual
    r = r.contiguous()
    return (r * inverse_rms(r, eps) * weight).to(x.dtype), r


def add_rms_norm_backward(
    dy: Tensor | None, dr: Tensor | None, r: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of r (x and residual have the same one) and weight; a missing `dy` or `dr` is zero."""
    total = torch.zeros_like(r) if dr is None else dr.to(r.dtype, copy=True)
    if dy is None:
        return total, torch.zeros_like(weight)
    normed = r * inverse_rms(r, eps)
    scaled = dy.to(r.dtype) * weight
    total += inverse_rms(r, eps) * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return total, (dy.to(r.dtype) * normed).reshape(-1, r.shape[-1]).sum(0)


def inverse_rms(r: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(mean(r^2) + eps), (..., 1)."""
    return torch.rsqrt(r.square().mean(-1, keepdim=True) + eps)
