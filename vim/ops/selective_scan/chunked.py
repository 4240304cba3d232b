"""The selective scan in plain PyTorch, which runs where no kernel does: `reference.py` in chunks of tokens.

Gradients are written by hand: a backward pass needs the states at the entry of each chunk, and rebuilds the others.
Forward and backward hold the states of one chunk at a time, so memory does not grow with the length of the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vim.ops.common.layout import CHECKPOINT_EVERY, accumulate_dtype, like_layout
from vim.ops.common.segments import find_restarts
from vim.ops.selective_scan.inputs import PLAIN_TENSORS, ScanInputs, is_constant, segmented, split_backward


def selective_scan(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Run `segmented_scan` without an initial state and sequence indices."""
    return segmented_scan(*segmented(arguments))


def selective_scan_backward(dout: Tensor, dlast_state: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    """Run `segmented_scan_backward` without an initial state and sequence indices."""
    return segmented_scan_backward(dout, dlast_state, *segmented(arguments))[:PLAIN_TENSORS]


def segmented_scan(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return out (batch, dim, len), last state (batch, dim, d_state), entry states (batch, chunks, d_state, dim).

    Args:
        arguments: See `ScanInputs`.
    """
    inputs = ScanInputs(*arguments)
    u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus, reverse, checkpoint_every = inputs
    acc = accumulate_dtype(u.dtype)
    batch, dim, seqlen = u.shape
    state = A.new_zeros(batch, dim, A.shape[1]) if initial_state is None else initial_state.to(A.dtype)
    restarts = None if seq_idx is None else find_restarts(seq_idx, reverse)
    step = step_size(delta, delta_bias, delta_softplus)
    every = checkpoint_every or CHECKPOINT_EVERY
    entry_states, outputs = [], []
    for tokens in chunks(seqlen, every, reverse):
        entry_states.append(state.mT)
        decay, drive = discretize(u[..., tokens].to(acc), step[..., tokens], A, expand_map(B, A, tokens))
        states = run_states(state, decay, drive, restarts_in(restarts, tokens), reverse)
        outputs.append(read_out(torch.stack(states), expand_map(C, A, tokens)))
        state = states[0 if reverse else -1]
    y = torch.cat(outputs[::-1] if reverse else outputs).permute(1, 2, 0) if outputs else torch.zeros_like(step)
    if D is not None:
        y = y + D[:, None] * u.to(acc)
    if z is not None:
        y = y * F.silu(z.to(acc))
    if checkpoint_every and entry_states:
        checkpoints = torch.stack(entry_states[::-1] if reverse else entry_states, 1)
    else:
        checkpoints = A.new_empty(batch, 0, A.shape[1], dim)
    # Without tokens the last state is the initial one; an op's result must not be its input.
    return like_layout(y, u), state if outputs else state.clone(), checkpoints


def segmented_scan_backward(dout: Tensor, dlast_state: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    """Return du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state; an empty tensor where an input is absent.

    With g[l] the gradient of h[l], taken in the opposite order,

        g[l] = C[l] dy[l] + exp(delta[l+1] A) g[l+1]

    where the last term is 0 if a sequence starts at l+1, and everything else is elementwise in g, h and the inputs.
    Complex tensors follow PyTorch's conjugate convention.

    Args:
        dout: Gradient of out.
        dlast_state: Gradient of the last state; `None` is zero.
        arguments: See `split_backward`.
    """
    inputs, checkpoints = split_backward(arguments)
    u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus, reverse, checkpoint_every = inputs
    acc = accumulate_dtype(u.dtype)
    step = step_size(delta, delta_bias, delta_softplus)
    weight = 2 if A.is_complex() else 1
    dA = torch.zeros_like(A)
    dy = dout.to(acc) if z is None else dout.to(acc) * F.silu(z.to(acc))
    carry = A.new_zeros(u.shape[0], *A.shape) if dlast_state is None else dlast_state.to(A.dtype)
    restarts = None if seq_idx is None else find_restarts(seq_idx, reverse)
    found = []
    for tokens in reversed(list(chunks(u.shape[-1], checkpoint_every, reverse))):
        u_chunk, step_chunk, dy_chunk = (time_first(t[..., tokens].to(acc)) for t in (u, step, dy))
        B_chunk, C_chunk = expand_map(B, A, tokens), expand_map(C, A, tokens)
        decay, drive = discretize(u[..., tokens].to(acc), step[..., tokens], A, B_chunk)
        entry = checkpoints[:, tokens.start // checkpoint_every].mT
        restart = restarts_in(restarts, tokens)
        states = run_states(entry, decay, drive, restart, reverse)
        before = torch.stack([*states[1:], entry] if reverse else [entry, *states[:-1]])
        arriving = weight * dy_chunk[..., None] * C_chunk.conj()
        dstates = run_states(carry, decay.conj(), arriving, restart, not reverse, late=True)
        first = -1 if reverse else 0
        carry = dstates[first]
        if restart is not None:
            before, carry = before.masked_fill(restart, 0), carry.masked_fill(restart[first], 0)
        carry = decay.conj()[first] * carry
        g, h = torch.stack(dstates), torch.stack(states)
        dlog_decay = g * (before * decay).conj()
        dA = dA + (dlog_decay * step_chunk[..., None]).sum((0, 1))
        through_drive = (g * B_chunk.conj()).real.sum(-1)
        dstep_chunk = (dlog_decay * A.conj()).real.sum(-1) + through_drive * u_chunk
        dB_chunk = map_grad(g * (step_chunk * u_chunk)[..., None], B)
        dC_chunk = map_grad(weight * dy_chunk[..., None] * h.conj(), C)
        found.append((read_out(h, C_chunk), dstep_chunk, through_drive * step_chunk, dB_chunk, dC_chunk))
    absent = u.new_empty(0, dtype=acc)
    dinitial_state = A.new_empty(0) if initial_state is None else carry if found else carry.clone()
    if not found:
        zeros = [torch.zeros_like(t) if isinstance(t, Tensor) else absent for t in inputs[:PLAIN_TENSORS]]
        return *zeros[:6], zeros[6].to(u.dtype), zeros[7], dinitial_state
    *rows, dB, dC = zip(*(found if reverse else found[::-1]), strict=True)
    y, dstep, du = (torch.cat(chunk_rows).permute(1, 2, 0) for chunk_rows in rows)
    dD, dz, ddelta_bias = absent, absent.to(u.dtype), absent
    if D is not None:
        du = du + D[:, None] * dy
        y = y + D[:, None] * u.to(acc)
        dD = (dy * u.to(acc)).sum((0, 2))
    if z is not None:
        gate = torch.sigmoid(z.to(acc))
        dz = like_layout(dout.to(acc) * y * gate * (1 + z.to(acc) * (1 - gate)), z)
    if delta_softplus:
        dstep = dstep * -torch.expm1(-step)  # softplus'(x) = 1 - exp(-softplus(x))
    if delta_bias is not None:
        ddelta_bias = dstep.sum((0, 2))
    return (
        like_layout(du, u), like_layout(dstep, delta), dA, join_map_grads(dB, B), join_map_grads(dC, C), dD, dz,
        ddelta_bias, dinitial_state,
    )  # fmt: skip


def step_size(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    """Return the step size (batch, dim, len) in float32, or float64 for float64 input."""
    step = delta.to(accumulate_dtype(delta.dtype))
    if delta_bias is not None:
        step = step + delta_bias[:, None]
    # Above the threshold softplus(x) equals x to the last bit of float64.
    return F.softplus(step, threshold=40) if delta_softplus else step


def chunks(seqlen: int, every: int, reverse: bool) -> list[slice]:
    """Return ranges of `every` tokens in scan order."""
    ranges = [slice(start, min(start + every, seqlen)) for start in range(0, seqlen, every)]
    return ranges[::-1] if reverse else ranges


def discretize(u: Tensor, step: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the decay exp(delta A) and the drive delta B u of a chunk, both (len, batch, dim, d_state)."""
    step, u = time_first(step), time_first(u)
    return torch.exp(step[..., None] * A), (step * u)[..., None] * B


def restarts_in(restarts: Tensor | None, tokens: slice) -> Tensor | None:
    """Return a chunk of a mask (batch, len) in a shape that broadcasts with (len, batch, dim, d_state)."""
    return None if restarts is None else restarts[:, tokens].T[..., None, None]


def run_states(
    state: Tensor, decay: Tensor, drive: Tensor, restarts: Tensor | None, reverse: bool, late: bool = False
) -> list[Tensor]:
    """Return the states after each token, in token order.

    A token turns the state into `decay * state + drive`, where `state` is 0 if the token is in `restarts`. With `late`
    decay and restart are those of the token before in scan order, and the first token has none: so gradients travel.
    """
    states: list[Tensor] = [state] * len(drive)
    order = range(len(drive))
    pending = None
    for token in reversed(order) if reverse else order:
        source = pending if late else token
        if source is not None:
            state = decay[source] * (state if restarts is None else state.masked_fill(restarts[source], 0))
        state = state + drive[token]
        states[token], pending = state, token
    return states


def read_out(states: Tensor, C: Tensor) -> Tensor:
    """Return <h, C> of a chunk, (len, batch, dim)."""
    y = (states * C).sum(-1)
    return 2 * y.real if y.is_complex() else y


def time_first(x: Tensor) -> Tensor:
    """Turn (batch, dim, len) into (len, batch, dim)."""
    return x.permute(2, 0, 1)


def expand_map(B: Tensor, A: Tensor, tokens: slice) -> Tensor:
    """Return a chunk of B or C of any kind in a shape that broadcasts with (len, batch, dim, d_state)."""
    if is_constant(B):
        return B
    grouped = as_grouped(B.to(A.real.dtype), A)[..., tokens]
    return grouped.permute(3, 0, 1, 2).repeat_interleave(A.shape[0] // grouped.shape[1], dim=2)


def map_grad(grad: Tensor, B: Tensor) -> Tensor:
    """Return the gradient of a chunk of B or C, (len, batch, groups, d_state), or B's shape if B is constant.

    Args:
        grad: Gradient of the expanded chunk, (len, batch, dim, d_state).
        B: B or C.
    """
    if is_constant(B):
        return grad.sum((0, 1))
    return grad.unflatten(2, (B.shape[1] if B.dim() == 4 else 1, -1)).sum(3)


def join_map_grads(grads: Sequence[Tensor], B: Tensor) -> Tensor:
    """Return the gradient of B or C from the gradients of its chunks, in token order."""
    if is_constant(B):
        return torch.stack(list(grads)).sum(0).to(B.dtype)
    grad = torch.cat(list(grads)).permute(1, 2, 3, 0)
    if grad.is_complex():
        grad = torch.view_as_real(grad).flatten(-2)
    return (grad if B.dim() == 4 else grad.squeeze(1)).to(B.dtype).contiguous()


def as_grouped(B: Tensor, A: Tensor) -> Tensor:
    """View B or C as (batch, groups, d_state, len); with a complex A, (re, im) pairs become complex numbers."""
    grouped = B[:, None] if B.dim() == 3 else B
    return torch.view_as_complex(grouped.contiguous().unflatten(-1, (-1, 2))) if A.is_complex() else grouped
