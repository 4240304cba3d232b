"""Implementations of the ops for exports, made of operators that exporters know.

The recurrence is torch's `scan` operator, which torch.onnx turns into ONNX's Scan. So an exported model stays small
whatever its length, and runs in any ONNX runtime. A convolution is one operator; its reference takes one for each tap.
In PyTorch every backend is faster. Arguments and results are as the registered ops have them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan

from vim.ops.add_rms_norm.reference import add_rms_norm
from vim.ops.backends.registry import register_exportable
from vim.ops.bidirectional_block import reference as bidirectional_block
from vim.ops.bidirectional_scan import reference as bidirectional_scan
from vim.ops.causal_conv1d.reference import segmented_conv1d
from vim.ops.common.layout import accumulate_dtype
from vim.ops.common.segments import find_restarts
from vim.ops.embed_patches.reference import embed_patches
from vim.ops.selective_scan.inputs import ScanInputs, is_constant, segmented


def selective_scan(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Run one scan, (batch, dim, len); no entry states are saved."""
    return segmented_scan(*segmented(arguments))


def segmented_scan(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Run one scan from an initial state, over several sequences in a row; no entry states are saved."""
    inputs = ScanInputs(*arguments)
    u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus, reverse, _ = inputs
    if A.is_complex():
        raise ValueError(f"A must be real to be exported, got {A.dtype}")
    if torch.jit.is_tracing():
        raise RuntimeError("the recurrence needs torch.onnx.export(..., dynamo=True): TorchScript has no loop for it")
    acc, batch, dim = accumulate_dtype(u.dtype), u.shape[0], u.shape[1]
    wide = u.to(acc)
    step = delta.to(acc) if delta_bias is None else delta.to(acc) + delta_bias[:, None]
    step = F.softplus(step) if delta_softplus else step

    def advance(state: Tensor, token: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        u, step, B, C, *restart = token
        # The view makes the batch size an input of the loop; without it torch 2.14 cannot compile a dynamic batch.
        u = u.view(batch, dim)
        if restart:
            state = torch.where(restart[0].view(batch, 1, 1), 0.0, state)
        state = torch.exp(step[..., None] * A) * state + (step * u)[..., None] * B
        return state, (state * C).sum(-1)

    tokens: tuple[Tensor, ...] = (wide.permute(2, 0, 1), step.permute(2, 0, 1), _over_time(B, u), _over_time(C, u))
    if seq_idx is not None:
        tokens = (*tokens, find_restarts(seq_idx, reverse).T)
    if reverse:
        tokens = tuple(t.flip(0) for t in tokens)
    start = torch.zeros(u.shape[0], *A.shape, dtype=acc, device=u.device) if initial_state is None else initial_state
    last_state, y = scan(advance, start, tokens, dim=0)
    y = (y.flip(0) if reverse else y).permute(1, 2, 0)
    y = y if D is None else y + D[:, None] * wide
    y = y if z is None else y * F.silu(z.to(acc))
    return y.to(u.dtype), last_state, A.new_empty(u.shape[0], 0, A.shape[1], u.shape[1])


def _over_time(B: Tensor, u: Tensor) -> Tensor:
    """Return B or C of any kind as (len, batch or 1, dim or 1, d_state)."""
    if is_constant(B):
        return B.expand(u.shape[2], 1, *B.shape)
    grouped = (B[:, None] if B.dim() == 3 else B).to(accumulate_dtype(u.dtype)).permute(3, 0, 1, 2)
    return grouped if grouped.shape[2] == 1 else grouped.repeat_interleave(u.shape[1] // grouped.shape[2], dim=2)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """Run one convolution, (batch, dim, len)."""
    width = weight.shape[1]
    # To look ahead, flip the filter and pad at the end.
    kernel = weight.flip(1) if reverse else weight
    padded = F.pad(x.to(weight.dtype), (0, width - 1) if reverse else (width - 1, 0))
    out = F.conv1d(padded, kernel[:, None], bias, groups=weight.shape[0])
    return (F.silu(out) if silu else out).to(x.dtype)


def bidirectional_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, weight_b: Tensor, bias_b: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run both convolutions, (batch, len, dim)."""
    out = causal_conv1d(x.mT, weight, bias, True, False)
    return out.mT, causal_conv1d(x.mT, weight_b, bias_b, True, True).mT


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "selective_scan": selective_scan,
    "segmented_scan": segmented_scan,
    "bidirectional_scan": functools.partial(bidirectional_scan.compose, selective_scan),
    "causal_conv1d": causal_conv1d,
    "segmented_conv1d": segmented_conv1d,
    "bidirectional_conv1d": bidirectional_conv1d,
    "add_rms_norm": add_rms_norm,
    "embed_patches": embed_patches,
}
_FUNCTIONS["bidirectional_block"] = functools.partial(bidirectional_block.compose, _FUNCTIONS)

register_exportable(_FUNCTIONS)
