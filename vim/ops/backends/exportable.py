"""Implementations of the ops for exports, made of operators that exporters know.

The recurrence is torch's `scan` operator, which torch.onnx turns into ONNX's Scan. So an exported model stays small
whatever its length, and runs in any ONNX runtime. An exporter with a better form asks for one operator instead,
`vim::recurrence`, and translates it. A convolution is one operator; its reference takes one for each tap.
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

# `run_loop`, or an operator that stands for it.
Recurrence = Callable[..., tuple[Tensor, Tensor]]


def selective_scan(recurrence: Recurrence, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Run one scan, (batch, dim, len), by `run_loop` or `RECURRENCE`; no entry states are saved."""
    return segmented_scan(recurrence, *segmented(arguments))


def segmented_scan(recurrence: Recurrence, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Run one scan from an initial state, over several sequences in a row; no entry states are saved."""
    inputs = ScanInputs(*arguments)
    u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus, reverse, _ = inputs
    if A.is_complex():
        raise ValueError(f"A must be real to be exported, got {A.dtype}")
    if torch.jit.is_tracing():
        raise RuntimeError("the recurrence needs torch.onnx.export(..., dynamo=True): TorchScript has no loop for it")
    acc = accumulate_dtype(u.dtype)
    wide = u.to(acc)
    step = delta.to(acc) if delta_bias is None else delta.to(acc) + delta_bias[:, None]
    step = F.softplus(step) if delta_softplus else step
    tokens: tuple[Tensor, ...] = (wide.permute(2, 0, 1), step.permute(2, 0, 1), _over_time(B, u), _over_time(C, u))
    restarts = None if seq_idx is None else find_restarts(seq_idx, reverse).T
    if reverse:
        tokens = tuple(t.flip(0) for t in tokens)
        restarts = None if restarts is None else restarts.flip(0)
    y, last_state = recurrence(*tokens[:2], A, *tokens[2:], initial_state, restarts)
    y = (y.flip(0) if reverse else y).permute(1, 2, 0)
    y = y if D is None else y + D[:, None] * wide
    y = y if z is None else y * F.silu(z.to(acc))
    return y.to(u.dtype), last_state, A.new_empty(u.shape[0], 0, A.shape[1], u.shape[1])


def run_loop(
    u: Tensor,
    step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    restarts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence as torch's `scan`: state = exp(step A) state + step u B, y = <state, C>.

    Args:
        u, step: (len, batch, dim).
        A: (dim, d_state).
        B, C: (len, batch or 1, dim or 1, d_state).
        initial_state: (batch, dim, d_state); `None` is zero.
        restarts: True at a token before which the state becomes zero, (len, batch).

    Returns:
        y, (len, batch, dim), and the last state, (batch, dim, d_state).
    """
    batch, dim = u.shape[1:]

    def advance(state: Tensor, token: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        u, step, B, C, *restart = token
        # The view makes the batch size an input of the loop; without it torch 2.14 cannot compile a dynamic batch.
        u = u.view(batch, dim)
        if restart:
            state = torch.where(restart[0].view(batch, 1, 1), 0.0, state)
        state = torch.exp(step[..., None] * A) * state + (step * u)[..., None] * B
        return state, (state * C).sum(-1)

    start = torch.zeros(batch, *A.shape, dtype=u.dtype, device=u.device) if initial_state is None else initial_state
    tokens = (u, step, B, C) if restarts is None else (u, step, B, C, restarts)
    last_state, y = scan(advance, start, tokens, dim=0)
    return y, last_state


@torch.library.custom_op("vim::recurrence", mutates_args=())
def recurrence(
    u: Tensor,
    step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    restarts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `run_loop` as one operator of a graph, which an exporter translates in its own way."""
    return run_loop(u, step, A, B, C, initial_state, restarts)


@recurrence.register_fake
def _(u: Tensor, step: Tensor, A: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u, memory_format=torch.contiguous_format), u.new_empty(u.shape[1], *A.shape)


RECURRENCE = torch.ops.vim.recurrence.default


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


def _functions(recurrence: Recurrence) -> dict[str, Callable[..., Any]]:
    """Return the ops, with the recurrence in this form."""
    scan_once = functools.partial(selective_scan, recurrence)
    functions: dict[str, Callable[..., Any]] = {
        "selective_scan": scan_once,
        "segmented_scan": functools.partial(segmented_scan, recurrence),
        "bidirectional_scan": functools.partial(bidirectional_scan.compose, scan_once),
        "causal_conv1d": causal_conv1d,
        "segmented_conv1d": segmented_conv1d,
        "bidirectional_conv1d": bidirectional_conv1d,
        "add_rms_norm": add_rms_norm,
        "embed_patches": embed_patches,
    }
    return functions | {"bidirectional_block": functools.partial(bidirectional_block.compose, functions)}


register_exportable("scan", _functions(run_loop))
register_exportable("operator", _functions(RECURRENCE))
