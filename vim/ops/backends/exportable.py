"""Every op from operators that exporters know, the recurrence as torch's `scan` operator.

torch.onnx turns that operator into ONNX's Scan, so an exported model is small whatever its length and runs in any ONNX
runtime. To run in PyTorch every backend is faster. Signatures are those of the registered ops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan

from vim.ops.backends.registry import register_exportable
from vim.ops.bidirectional_block import reference as bidirectional_block
from vim.ops.bidirectional_scan.reference import project
from vim.ops.common.layout import accumulate_dtype
from vim.ops.embed_patches.reference import embed_patches
from vim.ops.selective_scan.reference import is_constant


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    checkpoint_every: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One scan, (batch, dim, len); no entry states are saved."""
    if A.is_complex():
        raise ValueError(f"A must be real to be exported, got {A.dtype}")
    if torch.jit.is_tracing():
        raise RuntimeError("the recurrence needs torch.onnx.export(..., dynamo=True): TorchScript has no loop for it")
    acc, batch, dim = accumulate_dtype(u.dtype), u.shape[0], u.shape[1]
    wide = u.to(acc)
    step = delta.to(acc) if delta_bias is None else delta.to(acc) + delta_bias[:, None]
    step = F.softplus(step) if delta_softplus else step

    def advance(state: Tensor, token: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        u, step, B, C = token
        # Naming the batch makes it an input of the loop: torch 2.14 cannot compile a dynamic one that is not.
        u = u.view(batch, dim)
        state = torch.exp(step[..., None] * A) * state + (step * u)[..., None] * B
        return state, (state * C).sum(-1)

    tokens: tuple[Tensor, ...] = (wide.permute(2, 0, 1), step.permute(2, 0, 1), _over_time(B, u), _over_time(C, u))
    if reverse:
        tokens = tuple(t.flip(0) for t in tokens)
    start = torch.zeros(u.shape[0], *A.shape, dtype=acc, device=u.device)
    last_state, y = scan(advance, start, tokens, dim=0)
    y = (y.flip(0) if reverse else y).permute(1, 2, 0)
    y = y if D is None else y + D[:, None] * wide
    y = y if z is None else y * F.silu(z.to(acc))
    return y.to(u.dtype), last_state, A.new_empty(u.shape[0], 0, A.shape[1], u.shape[1])


def _over_time(B: Tensor, u: Tensor) -> Tensor:
    """B or C of any kind as (len, batch or 1, dim or 1, d_state)."""
    if is_constant(B):
        return B.expand(u.shape[2], 1, *B.shape)
    grouped = (B[:, None] if B.dim() == 3 else B).to(accumulate_dtype(u.dtype)).permute(3, 0, 1, 2)
    return grouped if grouped.shape[2] == 1 else grouped.repeat_interleave(u.shape[1] // grouped.shape[2], dim=2)


def bidirectional_scan(*operands: Tensor | float | int) -> tuple[Tensor, Tensor]:
    """Both scans, (batch, len, dim); no entry states are saved."""
    *tensors, z, scale, _ = operands
    gate, total = z.to(accumulate_dtype(z.dtype)).mT, None  # type: ignore[union-attr]
    for direction, reverse in ((tensors[:6], False), (tensors[6:], True)):
        dt_bias = direction[3]
        out, _, _ = selective_scan(*project(*direction), gate, dt_bias, True, reverse, 0)  # type: ignore[arg-type]
        total = out if total is None else total + out
    u, A_log = tensors[0], tensors[4]
    y = (scale * total).mT.to(u.dtype)  # type: ignore[operator, union-attr]
    return y, A_log.new_empty(2, u.shape[0], 0, A_log.shape[1], u.shape[2])  # type: ignore[union-attr]


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """One convolution, (batch, dim, len)."""
    width = weight.shape[1]
    # Looking ahead is looking back with the filter turned round.
    kernel = weight.flip(1) if reverse else weight
    padded = F.pad(x.to(weight.dtype), (0, width - 1) if reverse else (width - 1, 0))
    out = F.conv1d(padded, kernel[:, None], bias, groups=weight.shape[0])
    return (F.silu(out) if silu else out).to(x.dtype)


def bidirectional_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, weight_b: Tensor, bias_b: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both convolutions, (batch, len, dim)."""
    out = causal_conv1d(x.mT, weight, bias, True, False)
    return out.mT, causal_conv1d(x.mT, weight_b, bias_b, True, True).mT


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Sum and norm."""
    acc = accumulate_dtype(x.dtype)
    r = x.to(acc) if residual is None else x.to(acc) + residual
    return (r * torch.rsqrt(r.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype), r


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (selective_scan, bidirectional_scan, causal_conv1d, bidirectional_conv1d, add_rms_norm)
}
_FUNCTIONS["embed_patches"] = embed_patches
_FUNCTIONS["bidirectional_block"] = functools.partial(bidirectional_block.compose, _FUNCTIONS)


register_exportable(_FUNCTIONS)
