"""The scans of both directions in plain PyTorch: the specification of every other backend.

Each direction has its own operands; the names of the backward ones end in `_b`. With x_dbl split into dt, B and C:

    delta = softplus(dt dt_weight^T + dt_bias),   A = -exp(A_log)
    y_dir = scan(u, delta, A, B, C, D)            from the first token on, or for `_b` from the last token on
    y     = scale (y_dir + y_dir_b) silu(z)

Channel-last, (batch, len, dim). Arithmetic is float32, or float64 for float64 input, under autocast too. The result is
rounded once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vim.ops.bidirectional_scan.operands import ScanOperands, split_directions
from vim.ops.common.layout import accumulate_dtype
from vim.ops.selective_scan.chunked import selective_scan, selective_scan_backward


def bidirectional_scan(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return y (batch, len, dim) and the entry states (2, batch, chunks, d_state, dim), forward direction first.

    Args:
        arguments: The operands of the forward and of the backward direction (see `ScanOperands`), z, scale, and
            `checkpoint_every` of `ScanInputs`.
    """
    with torch.autocast(arguments[0].device.type, enabled=False):
        return compose(selective_scan, *arguments)


def compose(scan: Callable[..., Any], *arguments: Any) -> tuple[Tensor, Tensor]:
    """Run both directions on an implementation of `vim::selective_scan`; the arguments are `bidirectional_scan`'s.

    The caller turns autocast off, except in exports, where that would become a subgraph of the exported program.
    """
    *operands, z, scale, checkpoint_every = arguments
    gate = z.to(accumulate_dtype(z.dtype)).mT
    outputs, checkpoints = [], []
    for direction, reverse in zip(split_directions(operands), (False, True), strict=True):
        inputs = project(direction)
        out, _, entry_states = scan(*inputs, gate, direction.dt_bias, True, reverse, checkpoint_every)
        outputs.append(out)
        checkpoints.append(entry_states)
    y = scale * (outputs[0] + outputs[1])
    return y.mT.to(z.dtype).contiguous(), torch.stack(checkpoints)


def bidirectional_scan_backward(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the gradients of the twelve operands in their order, and dz.

    Args:
        dy: Gradient of y.
        arguments: As `bidirectional_scan` takes them, with the entry states after z.
    """
    *operands, z, checkpoints, scale, checkpoint_every = arguments
    acc = accumulate_dtype(z.dtype)
    gate, dout = z.to(acc).mT, scale * dy.to(acc).mT
    grads: list[Tensor] = []
    dz = torch.zeros_like(gate)
    for direction, reverse in zip(split_directions(operands), (False, True), strict=True):
        with torch.autocast(z.device.type, enabled=False):
            inputs = project(direction)
        entry_states = checkpoints[int(reverse)]
        du, ddelta, dA, dB, dC, dD, dz_direction, ddt_bias = selective_scan_backward(
            dout, None, *inputs, gate, direction.dt_bias, entry_states, True, reverse, checkpoint_every
        )
        dz += dz_direction
        dt = direction.x_dbl[..., : direction.dt_weight.shape[1]].to(acc)
        with torch.autocast(z.device.type, enabled=False):
            ddt = ddelta.mT @ direction.dt_weight
            ddt_weight = ddelta.transpose(0, 1).flatten(1) @ dt.flatten(0, 1)
        dx_dbl = torch.cat([ddt, dB.mT, dC.mT], dim=-1)
        A = inputs[2]
        grads += [du.mT.to(z.dtype).contiguous(), dx_dbl.to(z.dtype), ddt_weight, ddt_bias, dA * A, dD]
    return *grads, dz.mT.to(z.dtype).contiguous()


def project(direction: ScanOperands) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return one direction's operands as the channel-first inputs u, delta, A, B, C, D of a selective scan."""
    u, x_dbl, dt_weight, _, A_log, D = direction
    acc = accumulate_dtype(u.dtype)
    d_state = A_log.shape[1]
    dt, B, C = x_dbl.to(acc).split([dt_weight.shape[1], d_state, d_state], dim=-1)
    return u.to(acc).mT, (dt @ dt_weight.T).mT, -torch.exp(A_log), B.mT, C.mT, D
