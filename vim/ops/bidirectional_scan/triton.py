"""The scans of both directions in Triton: the selective scan's programs with dt_proj fused, twice as many.

Each direction writes its sum over states in float32, and a second kernel merges and gates the two. A program for both
directions would halve the number of programs, which is too small for a GPU already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vim.ops.bidirectional_scan.operands import ScanOperands, split_directions
from vim.ops.common.layout import num_chunks
from vim.ops.common.triton_tensors import (
    Map,
    Rows,
    channels_last,
    common_alignment,
    lanes,
    load_tile,
    on_device,
    place_tile,
    rows,
    store_tile,
)
from vim.ops.selective_scan.triton import (
    SUBCHUNK,
    place_program,
    scan_backward,
    scan_forward,
    scratch_states,
)

# Tokens and channels that one program of a merging kernel takes.
_TOKENS, _CHANNELS = 8, 128


class Direction(NamedTuple):
    """Operands of one direction as kernels take them, and its sums over states.

    Launches unpack it: Triton 3.6 loses strides of 1 in a tuple within a tuple.
    """

    u: Rows
    x_dbl: Map
    dt_weight: tuple[Tensor, int, int]
    dt_bias: Tensor
    A_log: tuple[Tensor, int, int]
    D: Tensor
    y: Rows
    entry: Tensor


class Gradients(NamedTuple):
    """Outputs of one direction of a backward pass: gradients, partial sums of gradients, and scratch."""

    du: Rows
    ddelta: Rows
    dA: Tensor  # (batch, d_state, dim)
    dB: Tensor  # (batch, blocks, len, d_state)
    dC: Tensor
    dD: Tensor  # (batch, dim)
    ddt_bias: Tensor
    scratch: Tensor


@triton.jit
def bidirectional_scan_fwd_kernel(
    u, x_dbl, dt_weight, dt_bias, A_log, D, y, entry,
    u_b, x_dbl_b, dt_weight_b, dt_bias_b, A_log_b, D_b, y_b, entry_b,
    seqlen, dim, blocks,
    STATES: tl.constexpr, RANK: tl.constexpr, EVERY: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scan both directions; programs are (batch elements times blocks of channels, directions)."""
    batch, _, first, channels, inside = place_program(blocks, dim, BLOCK)
    if tl.program_id(1) == 0:
        scan_forward(
            u, x_dbl, dt_weight, dt_bias, A_log, x_dbl, x_dbl, D, None, y, entry, None, None, None,
            batch, first, channels, inside, seqlen, dim,
            STATES, RANK, EVERY, False, True, False, False, ALIGN,
        )  # fmt: skip
    else:
        scan_forward(
            u_b, x_dbl_b, dt_weight_b, dt_bias_b, A_log_b, x_dbl_b, x_dbl_b, D_b, None, y_b, entry_b, None, None, None,
            batch, first, channels, inside, seqlen, dim,
            STATES, RANK, EVERY, True, True, False, False, ALIGN,
        )  # fmt: skip


@triton.jit
def bidirectional_scan_bwd_kernel(
    u, x_dbl, dt_weight, dt_bias, A_log, D, y, entry,
    u_b, x_dbl_b, dt_weight_b, dt_bias_b, A_log_b, D_b, y_b, entry_b,
    du, ddelta, dA, dB, dC, dD, ddt_bias, scratch,
    du_b, ddelta_b, dA_b, dB_b, dC_b, dD_b, ddt_bias_b, scratch_b,
    dy, z, scale, seqlen, dim, blocks,
    STATES: tl.constexpr, RANK: tl.constexpr, EVERY: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
    SUB: tl.constexpr,
):  # fmt: skip
    """Differentiate both directions; programs are (batch elements times blocks of channels, directions)."""
    batch, block, first, channels, inside = place_program(blocks, dim, BLOCK)
    if tl.program_id(1) == 0:
        scan_backward(
            dy, None, u, x_dbl, dt_weight, dt_bias, A_log, x_dbl, x_dbl, D, z, None, entry, scratch,
            du, ddelta, None, y, dA, dB, dC, dD, ddt_bias, None, scale,
            batch, block, blocks, first, channels, inside, seqlen, dim,
            STATES, RANK, EVERY, False, True, False, False, ALIGN, SUB,
        )  # fmt: skip
    else:
        scan_backward(
            dy, None, u_b, x_dbl_b, dt_weight_b, dt_bias_b, A_log_b, x_dbl_b, x_dbl_b, D_b, z, None, entry_b, scratch_b,
            du_b, ddelta_b, None, y_b, dA_b, dB_b, dC_b, dD_b, ddt_bias_b, None, scale,
            batch, block, blocks, first, channels, inside, seqlen, dim,
            STATES, RANK, EVERY, True, True, False, False, ALIGN, SUB,
        )  # fmt: skip


@triton.jit
def merge_fwd_kernel(y, y_b, z, out, scale, seqlen, dim, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write out = scale (y + y_b) silu(z)."""
    batch, tokens, channels, inside = place_tile(seqlen, dim, TOKENS, CHANNELS)
    total = load_tile(y, batch, tokens, channels, inside) + load_tile(y_b, batch, tokens, channels, inside)
    gate = load_tile(z, batch, tokens, channels, inside)
    store_tile(out, batch, tokens, channels, scale * total * gate * tl.sigmoid(gate), inside)


@triton.jit
def merge_bwd_kernel(dout, y, y_b, z, dz, scale, seqlen, dim, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write dz = scale dout (y + y_b) silu'(z)."""
    batch, tokens, channels, inside = place_tile(seqlen, dim, TOKENS, CHANNELS)
    total = load_tile(y, batch, tokens, channels, inside) + load_tile(y_b, batch, tokens, channels, inside)
    gate, grad = load_tile(z, batch, tokens, channels, inside), load_tile(dout, batch, tokens, channels, inside)
    passed = tl.sigmoid(gate)
    store_tile(dz, batch, tokens, channels, scale * grad * total * passed * (1 + gate * (1 - passed)), inside)


def bidirectional_scan(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Implement `vim::bidirectional_scan_triton`; arguments and results are the reference's."""
    *operands, z, scale, every = arguments
    (batch, seqlen, dim), A_log = z.shape, operands[4]
    entry = A_log.new_empty(2, batch, num_chunks(seqlen, every), A_log.shape[1], dim)
    forward, backward = _directions(operands, entry)
    settings = _settings(forward, backward, every)
    blocks, out = triton.cdiv(dim, settings["BLOCK"]), z.new_empty(z.shape)
    with on_device(z):
        bidirectional_scan_fwd_kernel[(batch * blocks, 2)](*forward, *backward, seqlen, dim, blocks, **settings)
        merge_fwd_kernel[_tiles(z)](
            forward.y, backward.y, rows(z.mT), rows(out.mT), scale, seqlen, dim, TOKENS=_TOKENS, CHANNELS=_CHANNELS
        )
    return out, entry


def bidirectional_scan_backward(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Implement `vim::bidirectional_scan_backward_triton`; arguments and results are the reference's."""
    *operands, z, checkpoints, scale, every = arguments
    batch, seqlen, dim = z.shape
    forward, backward = _directions(operands, checkpoints.contiguous())
    settings = _settings(forward, backward, every)
    blocks, dz = triton.cdiv(dim, settings["BLOCK"]), z.new_empty(z.shape)
    gradients = [_gradients(z, blocks, settings) for _ in range(2)]
    with on_device(z):
        bidirectional_scan_bwd_kernel[(batch * blocks, 2)](
            *forward, *backward, *gradients[0], *gradients[1], rows(dy.mT), rows(z.mT), scale, seqlen, dim, blocks,
            SUB=SUBCHUNK, **settings,
        )  # fmt: skip
        merge_bwd_kernel[_tiles(z)](
            rows(dy.mT), forward.y, backward.y, rows(z.mT), rows(dz.mT), scale, seqlen, dim,
            TOKENS=_TOKENS, CHANNELS=_CHANNELS,
        )  # fmt: skip
    totals = [_totals(g, side) for g, side in zip(gradients, split_directions(operands), strict=True)]
    return *totals[0], *totals[1], dz


def _directions(operands: Sequence[Tensor], entry: Tensor) -> tuple[Direction, Direction]:
    """Return both directions as kernels take them, with new tensors for their sums over states."""
    u, A_log = operands[0], operands[4]
    sums = A_log.new_empty(2, *u.shape)
    forward, backward = split_directions(operands)
    return _direction(forward, sums[0], entry[0]), _direction(backward, sums[1], entry[1])


def _direction(operands: ScanOperands, y: Tensor, entry: Tensor) -> Direction:
    u, x_dbl, dt_weight, dt_bias, A_log, D = operands
    batch, token, number = x_dbl.stride()
    return Direction(
        rows(u.mT),
        Map(x_dbl, batch, 0, number, token, u.shape[2]),
        channels_last(dt_weight),
        dt_bias.contiguous(),
        channels_last(A_log),
        D.contiguous(),
        rows(y.mT),
        entry,
    )


def _settings(forward: Direction, backward: Direction, every: int) -> dict[str, Any]:
    """Return the values that the scans are compiled for, besides the types."""
    strides = (stride for d in (forward, backward) for stride in (d.x_dbl.batch, d.x_dbl.token))
    return {
        "STATES": forward.A_log[0].shape[0],
        "RANK": forward.dt_weight[0].shape[0],
        "EVERY": every,
        "ALIGN": common_alignment(strides),
        "BLOCK": lanes(forward.u.base.device),
        "num_warps": 1,
    }


def _tiles(u: Tensor) -> tuple[int, int]:
    """Return the grid of the kernels that merge."""
    batch, seqlen, dim = u.shape
    return batch * triton.cdiv(seqlen, _TOKENS), triton.cdiv(dim, _CHANNELS)


def _gradients(u: Tensor, blocks: int, settings: dict[str, Any]) -> Gradients:
    """Allocate the gradients of one direction whose input is like `u`."""
    batch, seqlen, dim = u.shape
    d_state = settings["STATES"]

    def room(*shape: int) -> Tensor:
        return torch.empty(shape, device=u.device)

    return Gradients(
        rows(u.new_empty(u.shape).mT),
        rows(room(batch, seqlen, dim).mT),
        room(batch, d_state, dim),
        room(batch, blocks, seqlen, d_state),
        room(batch, blocks, seqlen, d_state),
        room(batch, dim),
        room(batch, dim),
        scratch_states(u, batch * blocks, settings["BLOCK"], d_state, settings["EVERY"]),
    )


def _totals(grads: Gradients, operands: ScanOperands) -> tuple[Tensor, ...]:
    """Return the gradients of one direction's operands in their order, from the partial sums."""
    _, x_dbl, dt_weight, _, A_log, _ = operands
    du, ddelta = grads.du.base.mT, grads.ddelta.base.mT
    with torch.autocast(x_dbl.device.type, enabled=False):
        dt = x_dbl[..., : dt_weight.shape[1]].to(ddelta.dtype)
        ddt = ddelta @ dt_weight.to(ddelta.dtype)
        ddt_weight = ddelta.flatten(0, 1).T @ dt.flatten(0, 1)
    dx_dbl = torch.cat([ddt, grads.dB.sum(1), grads.dC.sum(1)], dim=-1).to(x_dbl.dtype)
    dA_log = grads.dA.sum(0).T * -torch.exp(A_log)
    return du, dx_dbl, ddt_weight, grads.ddt_bias.sum(0), dA_log.contiguous(), grads.dD.sum(0)
