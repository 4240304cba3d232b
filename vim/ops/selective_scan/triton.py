"""The selective scan in Triton, for GPUs without kernels of their own; the bidirectional scan builds on it.

One program takes a block of channels of one batch element from the first token in scan order to the last; a reverse
scan only indexes tokens from the end. States are (d_state, channels). In a block as wide as a warp, each lane has one
channel with all its states in registers, so sums over states stay inside a thread. There are no atomic additions: each
program writes its own partial sums, and PyTorch adds them up.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vim.ops.common.layout import empty_like_layout, num_chunks
from vim.ops.common.triton_tensors import (
    Map,
    channels_last,
    common_alignment,
    contiguous,
    lanes,
    load_map,
    load_rows,
    load_states,
    on_device,
    optional_rows,
    rows,
    softplus,
    store_rows,
    store_states,
)
from vim.ops.selective_scan.inputs import PLAIN_TENSORS, ScanInputs, is_constant, segmented, split_backward

# Tokens whose states the backward pass holds in registers at a time.
SUBCHUNK = 4
_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def load_decay(A, channels, inside, STATES: tl.constexpr, RANK: tl.constexpr):
    """Load A, or -exp(A_log) if dt_proj is fused."""
    decay = load_states(A[0], A[1], A[2], channels, inside, STATES)
    if RANK > 0:
        decay = -tl.exp(decay)
    return decay


@triton.jit
def load_step(delta, batch, first, channels, inside, token, RANK: tl.constexpr, ALIGN: tl.constexpr):
    """Load the input of the step size in the stored dtype: delta, or dt if dt_proj is fused."""
    if RANK > 0:
        step = load_map(delta, batch, first, token, 0, RANK, ALIGN)
    else:
        step = load_rows(delta, batch, channels, token, inside)
    return step


@triton.jit
def load_B(B, batch, first, channels, inside, token, STATES: tl.constexpr, START: tl.constexpr,
           CONSTANT: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """Load B or C at one token in the stored dtype, to be broadcast over (states, channels)."""
    if CONSTANT:
        values = load_states(B.base, B.group, B.state, channels, inside, STATES)
    else:
        values = load_map(B, batch, first, token, START, STATES, ALIGN)[:, None]
    return values


@triton.jit
def step_before_softplus(step, weight, bias, RANK: tl.constexpr):
    """Return the step size before softplus, (channels,)."""
    step = step.to(tl.float32)
    if RANK > 0:
        step = tl.sum(step[:, None] * weight, axis=0)
    return step + bias


@triton.jit
def load_channels(base, channels, inside):
    """Load a number for each channel; 0 if there is no tensor."""
    if base is None:
        values = tl.zeros(channels.shape, tl.float32)
    else:
        values = tl.load(base + channels, mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def load_weight(weight, channels, inside, RANK: tl.constexpr):
    """Load dt_proj's weight, (rank padded to a power of two, channels); a placeholder if there is none."""
    if RANK > 0:
        values = load_states(weight[0], weight[1], weight[2], channels, inside, RANK)
    else:
        values = tl.zeros((1, channels.shape[0]), tl.float32)
    return values


@triton.jit
def continues(seq_idx, batch, token, seqlen, REVERSE: tl.constexpr):
    """Return True if the token before in scan order is of the same sequence, or there is none."""
    row = seq_idx + batch.to(tl.int64) * seqlen
    before = tl.minimum(token + 1, seqlen - 1) if REVERSE else tl.maximum(token - 1, 0)
    return tl.load(row + token) == tl.load(row + before)


@triton.jit
def scan_forward(
    u, delta, weight, bias, A, B, C, D, z, out, entry, initial_state, last_state, seq_idx,
    batch, first, channels, inside, seqlen, dim,
    STATES: tl.constexpr, RANK: tl.constexpr, EVERY: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr,
    CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Scan a block of channels of one batch element.

    Operands are prefetched one token ahead, and stay in the stored dtype until they are used.
    """
    C_START: tl.constexpr = RANK + STATES if RANK > 0 else 0
    decay = load_decay(A, channels, inside, STATES, RANK) * _LOG2_E
    weight = load_weight(weight, channels, inside, RANK)
    bias, skip = load_channels(bias, channels, inside), load_channels(D, channels, inside)
    state = tl.zeros_like(decay)
    if initial_state is not None:
        at = initial_state + batch.to(tl.int64) * dim * STATES
        state = load_states(at, STATES, 1, channels, inside, STATES)
    chunks = tl.cdiv(seqlen, EVERY) if EVERY > 0 else 0
    token = seqlen - 1 if REVERSE else 0
    u_next = load_rows(u, batch, channels, token, inside)
    step_next = load_step(delta, batch, first, channels, inside, token, RANK, ALIGN)
    B_next = load_B(B, batch, first, channels, inside, token, STATES, RANK, CONSTANT_B, ALIGN)
    C_next = load_B(C, batch, first, channels, inside, token, STATES, C_START, CONSTANT_C, ALIGN)
    for i in tl.range(0, seqlen, loop_unroll_factor=2):
        token = seqlen - 1 - i if REVERSE else i
        u_now, step, B_now, C_now = u_next, step_next, B_next, C_next
        following = tl.maximum(token - 1, 0) if REVERSE else tl.minimum(token + 1, seqlen - 1)
        u_next = load_rows(u, batch, channels, following, inside)
        step_next = load_step(delta, batch, first, channels, inside, following, RANK, ALIGN)
        if not CONSTANT_B:
            B_next = load_B(B, batch, first, channels, inside, following, STATES, RANK, False, ALIGN)
        if not CONSTANT_C:
            C_next = load_B(C, batch, first, channels, inside, following, STATES, C_START, False, ALIGN)
        if EVERY > 0:
            enters = ((token + 1) % EVERY == 0) | (i == 0) if REVERSE else token % EVERY == 0
            if enters:
                at = entry + (batch.to(tl.int64) * chunks + token // EVERY) * STATES * dim
                store_states(at, 1, dim, state, channels, inside, STATES)
        if seq_idx is not None:
            state = tl.where(continues(seq_idx, batch, token, seqlen, REVERSE), state, 0.0)
        x = step_before_softplus(step, weight, bias, RANK)
        x = softplus(x) if SOFTPLUS else x
        u_now = u_now.to(tl.float32)
        state = tl.exp2(x[None, :] * decay) * state + (x * u_now)[None, :] * B_now.to(tl.float32)
        y = tl.sum(state * C_now.to(tl.float32), axis=0) + skip * u_now
        if z is not None:
            gate = load_rows(z, batch, channels, token, inside).to(tl.float32)
            y *= gate * tl.sigmoid(gate)
        store_rows(out, batch, channels, token, y, inside)
    if last_state is not None:
        at = last_state + batch.to(tl.int64) * dim * STATES
        store_states(at, STATES, 1, state, channels, inside, STATES)


@triton.jit
def load_drive(
    u, delta, weight, bias, B, batch, first, channels, inside, token,
    STATES: tl.constexpr, RANK: tl.constexpr, CONSTANT_B: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Load the inputs of the state at a token in float32: u, delta before softplus, B."""
    step = load_step(delta, batch, first, channels, inside, token, RANK, ALIGN)
    return (
        load_rows(u, batch, channels, token, inside).to(tl.float32),
        step_before_softplus(step, weight, bias, RANK),
        load_B(B, batch, first, channels, inside, token, STATES, RANK, CONSTANT_B, ALIGN).to(tl.float32),
    )


@triton.jit
def rebuild_states(
    state, scratch, u, delta, weight, bias, B, decay, seq_idx, batch, first, channels, inside, seqlen, start, pieces,
    STATES: tl.constexpr, RANK: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr,
    CONSTANT_B: tl.constexpr, ALIGN: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """Write the states that enter the pieces of a chunk, `SUB` tokens each from `start` on, to scratch."""
    SIZE: tl.constexpr = state.shape[0] * state.shape[1]
    lane = channels - first
    for piece in range(pieces - 1):
        store_states(scratch + piece * SIZE, 1, state.shape[1], state, lane, lane >= 0, STATES)
        for i in tl.static_range(SUB):
            token = start - piece * SUB - i if REVERSE else start + piece * SUB + i
            u_now, x, B_now = load_drive(
                u, delta, weight, bias, B, batch, first, channels, inside, token, STATES, RANK, CONSTANT_B, ALIGN
            )
            x = softplus(x) if SOFTPLUS else x
            if seq_idx is not None:
                state = tl.where(continues(seq_idx, batch, token, seqlen, REVERSE), state, 0.0)
            state = tl.exp2(x[None, :] * decay) * state + (x * u_now)[None, :] * B_now
    store_states(scratch + (pieces - 1) * SIZE, 1, state.shape[1], state, lane, lane >= 0, STATES)


@triton.jit
def sweep_token(
    carry, before, B_now, C_now, A, kept, x, u_now, dy, skip
):  # fmt: skip
    """Differentiate one token.

    `carry` is the part of the gradient of the state after the token that comes from later tokens. `kept` is the decay,
    `before` the decayed state. Returns the next carry, then the gradients of the state after the token, `x`, u and A.
    """
    g = carry + dy[None, :] * C_now
    through_decay = g * before
    through_drive = tl.sum(g * B_now, axis=0)
    dx = tl.sum(through_decay * A, axis=0) + through_drive * u_now
    return kept * g, g, dx, through_drive * x + skip * dy, through_decay * x[None, :]


@triton.jit
def sweep_piece(
    state, sums, dout, z, u, delta, weight, bias, A, decay, B, C, skip, seq_idx, du, ddelta, dz, y_sum, dB, dC, scale,
    batch, first, channels, inside, seqlen, start, begin, end,
    STATES: tl.constexpr, RANK: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr,
    CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr, ALIGN: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """Differentiate `SUB` tokens, from the state that enters the first of them; return the new sums."""
    C_START: tl.constexpr = RANK + STATES if RANK > 0 else 0
    carry, A_grad, B_grad, C_grad, skip_grad, bias_grad = sums
    states, inputs, steps, slopes, douts, gates = (), (), (), (), (), ()
    for i in tl.static_range(SUB):
        token = start - i if REVERSE else start + i
        valid = (token >= begin) & (token < end)
        token = tl.minimum(tl.maximum(token, begin), end - 1)
        u_now, x, B_now = load_drive(
            u, delta, weight, bias, B, batch, first, channels, inside, token, STATES, RANK, CONSTANT_B, ALIGN
        )
        douts = douts + (load_rows(dout, batch, channels, token, inside & valid).to(tl.float32) * scale,)
        if z is not None:
            gates = gates + (load_rows(z, batch, channels, token, inside).to(tl.float32),)
        if SOFTPLUS:
            slopes = slopes + (tl.sigmoid(x),)
            x = softplus(x)
        x = tl.where(valid, x, 0.0)  # a token past the end changes neither the state nor its gradient
        if seq_idx is not None:
            same = continues(seq_idx, batch, token, seqlen, REVERSE) | (valid == 0)
            state = tl.where(same, state, 0.0)
        states, inputs, steps = states + (state,), inputs + (u_now,), steps + (x,)
        state = tl.exp2(x[None, :] * decay) * state + (x * u_now)[None, :] * B_now
    index = tl.arange(0, A.shape[0])
    for i in tl.static_range(SUB - 1, -1, -1):
        token = start - i if REVERSE else start + i
        valid = (token >= begin) & (token < end)
        token = tl.minimum(tl.maximum(token, begin), end - 1)
        B_now = load_B(B, batch, first, channels, inside, token, STATES, RANK, CONSTANT_B, ALIGN).to(tl.float32)
        C_now = load_B(C, batch, first, channels, inside, token, STATES, C_START, CONSTANT_C, ALIGN).to(tl.float32)
        kept = tl.exp2(steps[i][None, :] * decay)
        if seq_idx is not None:
            kept = tl.where(continues(seq_idx, batch, token, seqlen, REVERSE) | (valid == 0), kept, 0.0)
        before = kept * states[i]
        drive = (steps[i] * inputs[i])[None, :]
        after = before + drive * B_now
        dy = douts[i]
        if z is not None:
            passed = tl.sigmoid(gates[i])
            dy *= gates[i] * passed
        if (dz is not None) | (y_sum is not None):
            y = tl.sum(after * C_now, axis=0) + skip * inputs[i]
            if dz is not None:
                dgate = douts[i] * y * passed * (1 + gates[i] * (1 - passed))
                store_rows(dz, batch, channels, token, dgate, inside & valid)
            else:
                store_rows(y_sum, batch, channels, token, y, inside & valid)
        carry, g, dx, du_now, dA_now = sweep_token(carry, before, B_now, C_now, A, kept, steps[i], inputs[i], dy, skip)
        if SOFTPLUS:
            dx *= slopes[i]
        store_rows(ddelta, batch, channels, token, dx, inside & valid)
        store_rows(du, batch, channels, token, du_now, inside & valid)
        A_grad += dA_now
        skip_grad += dy * inputs[i]
        bias_grad += tl.where(valid, dx, 0.0)
        if CONSTANT_B:
            B_grad += g * drive
        else:
            tl.store(dB + token * STATES + index, tl.sum(g * drive, axis=1), mask=(index < STATES) & valid)
        if CONSTANT_C:
            C_grad += dy[None, :] * after
        else:
            tl.store(dC + token * STATES + index, tl.sum(dy[None, :] * after, axis=1), mask=(index < STATES) & valid)
    return carry, A_grad, B_grad, C_grad, skip_grad, bias_grad


@triton.jit
def scan_backward(
    dout, dlast_state, u, delta, weight, bias, A, B, C, D, z, seq_idx, entry, scratch,
    du, ddelta, dz, y_sum, dA, dB, dC, dD, dbias, dinitial_state, scale,
    batch, block, blocks, first, channels, inside, seqlen, dim,
    STATES: tl.constexpr, RANK: tl.constexpr, EVERY: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr,
    CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr, ALIGN: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """Differentiate chunk by chunk against scan order.

    Each chunk rebuilds the states at every `SUB`th token. Each piece of `SUB` tokens then rebuilds the states between.
    """
    A = load_decay(A, channels, inside, STATES, RANK)
    decay = A * _LOG2_E
    weight = load_weight(weight, channels, inside, RANK)
    bias, skip = load_channels(bias, channels, inside), load_channels(D, channels, inside)
    carry = tl.zeros_like(A)
    if dlast_state is not None:
        carry = load_states(dlast_state + batch.to(tl.int64) * dim * STATES, STATES, 1, channels, inside, STATES)
    # The carry, and sums over tokens: the gradients of A, a constant B and C, D, and the bias.
    sums = (carry, tl.zeros_like(A), tl.zeros_like(A), tl.zeros_like(A), tl.zeros_like(bias), tl.zeros_like(bias))
    program = batch.to(tl.int64) * blocks + block
    SIZE: tl.constexpr = A.shape[0] * A.shape[1]
    scratch += program * tl.cdiv(EVERY, SUB) * SIZE
    # The gradient of a constant B or C has a part for each batch element, any other one for each program and token.
    dB += batch.to(tl.int64) * STATES * dim if CONSTANT_B else program * seqlen * STATES
    dC += batch.to(tl.int64) * STATES * dim if CONSTANT_C else program * seqlen * STATES
    lane = channels - first
    chunks = tl.cdiv(seqlen, EVERY)
    for c in range(chunks):
        chunk = c if REVERSE else chunks - 1 - c
        begin = chunk * EVERY
        end = tl.minimum(begin + EVERY, seqlen)
        start = end - 1 if REVERSE else begin
        pieces = tl.cdiv(end - begin, SUB)
        at = entry + (batch.to(tl.int64) * chunks + chunk) * STATES * dim
        rebuild_states(
            load_states(at, 1, dim, channels, inside, STATES), scratch, u, delta, weight, bias, B, decay, seq_idx,
            batch, first, channels, inside, seqlen, start, pieces,
            STATES, RANK, REVERSE, SOFTPLUS, CONSTANT_B, ALIGN, SUB,
        )  # fmt: skip
        tl.debug_barrier()  # a thread may read what another thread wrote
        for p in range(pieces):
            piece = pieces - 1 - p
            state = load_states(scratch + piece * SIZE, 1, A.shape[1], lane, lane >= 0, STATES)
            sums = sweep_piece(
                state, sums, dout, z, u, delta, weight, bias, A, decay, B, C, skip, seq_idx,
                du, ddelta, dz, y_sum, dB, dC, scale, batch, first, channels, inside, seqlen,
                start - piece * SUB if REVERSE else start + piece * SUB, begin, end,
                STATES, RANK, REVERSE, SOFTPLUS, CONSTANT_B, CONSTANT_C, ALIGN, SUB,
            )  # fmt: skip
        tl.debug_barrier()
    carry, A_grad, B_grad, C_grad, skip_grad, bias_grad = sums
    at = batch.to(tl.int64) * dim
    store_states(dA + at * STATES, 1, dim, A_grad, channels, inside, STATES)
    if dinitial_state is not None:
        store_states(dinitial_state + at * STATES, STATES, 1, carry, channels, inside, STATES)
    if CONSTANT_B:
        store_states(dB, 1, dim, B_grad, channels, inside, STATES)
    if CONSTANT_C:
        store_states(dC, 1, dim, C_grad, channels, inside, STATES)
    tl.store(dD + at + channels, skip_grad, mask=inside)
    tl.store(dbias + at + channels, bias_grad, mask=inside)


@triton.jit
def place_program(blocks, segment, BLOCK: tl.constexpr):
    """Return a program's batch element, block, first channel, channels, and a mask of those that exist.

    A block stays within one segment: the channels that share both a group of B and a group of C.
    """
    program = tl.program_id(0)
    batch, block = program // blocks, program % blocks
    per_segment = tl.cdiv(segment, BLOCK)
    first = (block // per_segment) * segment + (block % per_segment) * BLOCK
    channels = first + tl.arange(0, BLOCK)
    return batch, block, first, channels, channels < (block // per_segment + 1) * segment


@triton.jit
def selective_scan_fwd_kernel(
    u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, out, last_state, entry, seqlen, dim, blocks, segment,
    STATES: tl.constexpr, EVERY: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr,
    CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scan one direction; programs are batch elements times blocks of channels."""
    batch, _, first, channels, inside = place_program(blocks, segment, BLOCK)
    scan_forward(
        u, delta, None, delta_bias, A, B, C, D, z, out, entry, initial_state, last_state, seq_idx,
        batch, first, channels, inside, seqlen, dim,
        STATES, 0, EVERY, REVERSE, SOFTPLUS, CONSTANT_B, CONSTANT_C, ALIGN,
    )  # fmt: skip


@triton.jit
def selective_scan_bwd_kernel(
    dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, seq_idx, entry, scratch,
    du, ddelta, dz, dA, dB, dC, dD, dbias, dinitial_state, seqlen, dim, blocks, segment,
    STATES: tl.constexpr, EVERY: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr,
    CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """Differentiate one direction; programs are batch elements times blocks of channels."""
    batch, block, first, channels, inside = place_program(blocks, segment, BLOCK)
    scan_backward(
        dout, dlast_state, u, delta, None, delta_bias, A, B, C, D, z, seq_idx, entry, scratch,
        du, ddelta, dz, None, dA, dB, dC, dD, dbias, dinitial_state, 1.0,
        batch, block, blocks, first, channels, inside, seqlen, dim,
        STATES, 0, EVERY, REVERSE, SOFTPLUS, CONSTANT_B, CONSTANT_C, ALIGN, SUB,
    )  # fmt: skip


def selective_scan(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Implement `vim::selective_scan_triton`; arguments and results are the reference's."""
    return segmented_scan(*segmented(arguments))


def selective_scan_backward(dout: Tensor, dlast_state: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    """Implement `vim::selective_scan_backward_triton`; arguments and results are the reference's."""
    return segmented_scan_backward(dout, dlast_state, *segmented(arguments))[:PLAIN_TENSORS]


def segmented_scan(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Implement `vim::segmented_scan_triton`; arguments and results are the reference's."""
    inputs = ScanInputs(*arguments)
    u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus, reverse, checkpoint_every = inputs
    batch, dim, seqlen = u.shape
    d_state = A.shape[1]
    out, last_state = empty_like_layout(u), A.new_empty(batch, dim, d_state)
    entry = A.new_empty(batch, num_chunks(seqlen, checkpoint_every), d_state, dim)
    cut = _Cut(u, B, C)
    with on_device(u):
        selective_scan_fwd_kernel[(batch * cut.blocks,)](
            rows(u), rows(delta), channels_last(A), cut.map(B), cut.map(C), contiguous(D), optional_rows(z),
            contiguous(delta_bias), contiguous(initial_state), contiguous(seq_idx), rows(out), last_state, entry,
            seqlen, dim, cut.blocks, cut.segment,
            EVERY=checkpoint_every, **cut.settings(d_state, reverse, delta_softplus),
        )  # fmt: skip
    return out, last_state, entry


def segmented_scan_backward(dout: Tensor, dlast_state: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    """Implement `vim::segmented_scan_backward_triton`; arguments and results are the reference's."""
    inputs, checkpoints = split_backward(arguments)
    u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus, reverse, checkpoint_every = inputs
    batch, dim, seqlen = u.shape
    d_state = A.shape[1]
    cut = _Cut(u, B, C)
    du, ddelta, dz = empty_like_layout(u), empty_like_layout(delta), None if z is None else empty_like_layout(z)
    dA, dB, dC = (cut.partials(t, d_state) for t in (A, B, C))
    dD, dbias = A.new_empty(2, batch, dim)
    dinitial_state = None if initial_state is None else A.new_empty(batch, dim, d_state)
    with on_device(u):
        selective_scan_bwd_kernel[(batch * cut.blocks,)](
            rows(dout), contiguous(dlast_state), rows(u), rows(delta), channels_last(A), cut.map(B), cut.map(C),
            contiguous(D), optional_rows(z), contiguous(delta_bias), contiguous(seq_idx), contiguous(checkpoints),
            cut.scratch(d_state, checkpoint_every), rows(du), rows(ddelta), optional_rows(dz), dA, dB, dC, dD, dbias,
            dinitial_state, seqlen, dim, cut.blocks, cut.segment,
            EVERY=checkpoint_every, SUB=SUBCHUNK, **cut.settings(d_state, reverse, delta_softplus),
        )  # fmt: skip
    absent = A.new_empty(0)
    return (
        du, ddelta, cut.total(dA, A), cut.total(dB, B), cut.total(dC, C), absent if D is None else dD.sum(0),
        u.new_empty(0) if dz is None else dz, absent.clone() if delta_bias is None else dbias.sum(0),
        A.new_empty(0) if dinitial_state is None else dinitial_state,
    )  # fmt: skip


def scratch_states(like: Tensor, programs: int, block: int, d_state: int, every: int) -> Tensor:
    """Allocate the states that the programs of a backward pass rebuild, one chunk at a time."""
    pieces = triton.cdiv(every, SUBCHUNK)
    return torch.empty(programs, pieces, triton.next_power_of_2(d_state), block, device=like.device)


class _Cut:
    """Partition of the channels into blocks, each within one group of B and one group of C."""

    def __init__(self, u: Tensor, B: Tensor, C: Tensor) -> None:
        self.batch, self.dim, self.seqlen = u.shape
        self.device, self.B, self.C = u.device, B, C
        self.segment = math.gcd(self._channels_in_a_group(B), self._channels_in_a_group(C))
        self.block = lanes(u.device)
        self.blocks = self.dim // self.segment * triton.cdiv(self.segment, self.block)

    def _channels_in_a_group(self, B: Tensor) -> int:
        return self.dim // B.shape[1] if B.dim() == 4 else self.dim

    def map(self, B: Tensor) -> Map:
        """Return B or C as kernels take it."""
        if is_constant(B):
            dense, channel, state = channels_last(B)
            return Map(dense, 0, channel, state, 0, 1)
        grouped = B if B.dim() == 4 else B[:, None]
        batch, group, state, token = grouped.stride()
        return Map(B, batch, group, state, token, self._channels_in_a_group(B))

    def settings(self, d_state: int, reverse: bool, softplus: bool) -> dict[str, Any]:
        """Return the values that kernels are compiled for, besides the types."""
        varying = [self.map(t) for t in (self.B, self.C) if not is_constant(t)]
        return {
            "STATES": d_state,
            "REVERSE": reverse,
            "SOFTPLUS": softplus,
            "CONSTANT_B": is_constant(self.B),
            "CONSTANT_C": is_constant(self.C),
            "ALIGN": common_alignment(stride for m in varying for stride in (m.batch, m.group, m.token)),
            "BLOCK": self.block,
            "num_warps": 1,
        }

    def scratch(self, d_state: int, every: int) -> Tensor:
        """Allocate the rebuilt states."""
        return scratch_states(self.B, self.batch * self.blocks, self.block, d_state, every)

    def partials(self, t: Tensor, d_state: int) -> Tensor:
        """Allocate every program's share of the gradient of A, B or C."""
        if is_constant(t):
            return torch.empty(self.batch, d_state, self.dim, device=self.device)
        return torch.empty(self.batch, self.blocks, self.seqlen, d_state, device=self.device)

    def total(self, partials: Tensor, t: Tensor) -> Tensor:
        """Add the shares up to the gradient of A, B or C."""
        if is_constant(t):
            return partials.sum(0).T.contiguous().to(t.dtype)
        groups = t.shape[1] if t.dim() == 4 else 1
        total = partials.unflatten(1, (groups, self.blocks // groups)).sum(2).mT.to(t.dtype)
        return total.reshape(t.shape).contiguous()
