"""Residual addition and RMSNorm in Triton: a program takes one row forward and some rows backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vim.ops.common.triton_tensors import on_device

# Programs of the backward pass, each with one share of the weight's gradient.
_SHARES = 1024


@triton.jit
def add_rms_norm_fwd_kernel(x, residual, weight, y, r, eps, dim, x_stride, residual_stride, BLOCK: tl.constexpr):
    """Write r = x + residual and y = r / rms(r) weight."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    mask = channels < dim
    total = tl.load(x + row * x_stride + channels, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + row * residual_stride + channels, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(weight + channels, mask=mask, other=0.0).to(tl.float32)
    inverse_rms = 1 / tl.sqrt(tl.sum(total * total, axis=0) / dim + eps)
    tl.store(r + row * dim + channels, total, mask=mask)
    tl.store(y + row * dim + channels, (total * inverse_rms * scale).to(y.dtype.element_ty), mask=mask)


@triton.jit
def add_rms_norm_bwd_kernel(
    dy, dr, r, weight, dtotal, dweight, eps, dim, rows, rows_each, dy_stride, dr_stride, r_stride, BLOCK: tl.constexpr
):
    """Write the gradient of r, and the share of some rows in the gradient of weight."""
    program = tl.program_id(0)
    channels = tl.arange(0, BLOCK)
    mask = channels < dim
    scale = tl.load(weight + channels, mask=mask, other=0.0).to(tl.float32)
    share = tl.zeros((BLOCK,), tl.float32)
    for i in range(rows_each):
        row = program.to(tl.int64) * rows_each + i
        there = mask & (row < rows)
        total = tl.load(r + row * r_stride + channels, mask=there, other=0.0).to(tl.float32)
        grad = tl.load(dy + row * dy_stride + channels, mask=there, other=0.0).to(tl.float32)
        inverse_rms = 1 / tl.sqrt(tl.sum(total * total, axis=0) / dim + eps)
        normed = total * inverse_rms
        scaled = grad * scale
        out = inverse_rms * (scaled - normed * (tl.sum(scaled * normed, axis=0) / dim))
        if dr is not None:
            out += tl.load(dr + row * dr_stride + channels, mask=there, other=0.0).to(tl.float32)
        tl.store(dtotal + row * dim + channels, out, mask=there)
        share += grad * normed
    tl.store(dweight + program * dim + channels, share, mask=mask)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Implement `vim::add_rms_norm_triton`; results are the reference's."""
    y, r = x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.float32)
    dim = x.shape[-1]
    x, residual = _as_rows(x), None if residual is None else _as_rows(residual)
    with on_device(x):
        add_rms_norm_fwd_kernel[(x.shape[0],)](
            x, residual, weight.contiguous(), y, r, eps, dim, x.stride(0),
            0 if residual is None else residual.stride(0), **_settings(dim),
        )  # fmt: skip
    return y, r


def add_rms_norm_backward(
    dy: Tensor | None, dr: Tensor | None, r: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Implement `vim::add_rms_norm_backward_triton`; results are the reference's."""
    if dy is None:
        dtotal = torch.zeros_like(r) if dr is None else dr.to(r.dtype, copy=True)
        return dtotal.contiguous(), torch.zeros_like(weight)
    dim, dtotal = r.shape[-1], r.new_empty(r.shape)
    r, dy, dr = _as_rows(r), _as_rows(dy), None if dr is None else _as_rows(dr)
    rows = r.shape[0]
    rows_each = triton.cdiv(rows, _SHARES)
    shares = triton.cdiv(rows, max(rows_each, 1))
    dweight = torch.empty(shares, dim, device=r.device)
    with on_device(r):
        add_rms_norm_bwd_kernel[(shares,)](
            dy, dr, r, weight.contiguous(), dtotal, dweight, eps, dim, rows, rows_each, dy.stride(0),
            0 if dr is None else dr.stride(0), r.stride(0), **_settings(dim),
        )  # fmt: skip
    return dtotal, dweight.sum(0)


def _as_rows(x: Tensor) -> Tensor:
    """Return (..., dim) as (rows, dim), contiguous within a row; copy only if the strides allow no view."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _settings(dim: int) -> dict[str, int]:
    """Return the launch settings: a row is one block, with a warp for every 256 channels."""
    block = triton.next_power_of_2(dim)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}
