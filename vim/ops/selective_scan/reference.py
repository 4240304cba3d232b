"""The selective scan as a loop over tokens: the specification of every implementation.

For each batch element and channel, with a state h of d_state numbers (Gu and Dao 2023, arXiv:2312.00752, Algorithm 2):

    delta[l] = softplus(delta[l] + delta_bias)
    h[l]     = exp(delta[l] A) h[l-1] + delta[l] B[l] u[l]
    y[l]     = (<C[l], h[l]> + D u[l]) silu(z[l])              (2 Re<C, h> where A is complex)

The state before the first token is `initial_state`, or 0. Where `seq_idx` changes from one token to the next, a
sequence ends and the next one starts: h[l-1] is 0 there. `reverse` runs l from the last token to the first. Arithmetic
is float32, or float64 for float64 input. Gradients come from autograd, which keeps every state; `chunked.py` computes
the same in less memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vim.ops.common.layout import accumulate_dtype
from vim.ops.common.segments import find_restarts


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
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return out (batch, dim, len) in the dtype of `u`, and the last state (batch, dim, d_state)."""
    acc = accumulate_dtype(u.dtype)
    batch, dim, seqlen = u.shape
    x, delta = u.to(acc), delta.to(acc)
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta, threshold=40)  # from 40 on, softplus(x) is x in float64
    B, C = _per_channel(B, A, seqlen), _per_channel(C, A, seqlen)
    h = A.new_zeros(batch, dim, A.shape[1]) if initial_state is None else initial_state
    restarts = None if seq_idx is None else find_restarts(seq_idx, reverse)
    outputs = [x[..., 0]] * seqlen
    for token in reversed(range(seqlen)) if reverse else range(seqlen):
        step = delta[..., token, None]  # (batch, dim, 1)
        if restarts is not None:
            h = h.masked_fill(restarts[:, token, None, None], 0)
        h = torch.exp(step * A) * h + step * B[..., token] * x[..., token, None]
        y = (C[..., token] * h).sum(-1)
        outputs[token] = 2 * y.real if A.is_complex() else y
    out = torch.stack(outputs, dim=-1)
    if D is not None:
        out = out + D[:, None] * x
    if z is not None:
        out = out * F.silu(z.to(acc))
    return out.to(u.dtype), h


def _per_channel(B: Tensor, A: Tensor, seqlen: int) -> Tensor:
    """Return B or C of any kind as (batch or 1, dim, d_state, len)."""
    if B.dim() == 2:  # constant, (dim, d_state)
        return B[None, ..., None].expand(1, *B.shape, seqlen)
    B = B.to(A.real.dtype)
    if A.is_complex():  # the last axis holds (re, im) pairs
        B = torch.view_as_complex(B.unflatten(-1, (-1, 2)).contiguous())
    grouped = B[:, None] if B.dim() == 3 else B  # (batch, groups, d_state, len)
    return grouped.repeat_interleave(A.shape[0] // grouped.shape[1], dim=1)
