"""The scans of both directions in plain PyTorch: the specification of every other backend.

Each direction has its own operands; those of the backward one end in `_b`. With x_dbl split into dt, B and C:

    delta = softplus(dt dt_weight^T + dt_bias),   A = -exp(A_log)
    y_dir = scan(u, delta, A, B, C, D)            from the first token on, or for `_b` from the last token on
    y     = scale (y_dir + y_dir_b) silu(z)

Channel-last, (batch, len, dim). Arithmetic is float32, or float64 for float64 input, and is rounded once, at the end:
under autocast too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vim.ops.common.layout import accumulate_dtype
from vim.ops.selective_scan.reference import selective_scan, selective_scan_backward


def bidirectional_scan(
    u: Tensor,
    x_dbl: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    u_b: Tensor,
    x_dbl_b: Tensor,
    dt_weight_b: Tensor,
    dt_bias_b: Tensor,
    A_b_log: Tensor,
    D_b: Tensor,
    z: Tensor,
    scale: float,
    checkpoint_every: int,
) -> tuple[Tensor, Tensor]:
    """Return y (batch, len, dim) and the entry states (2, batch, chunks, d_state, dim), forward direction first."""
    gate = z.to(accumulate_dtype(z.dtype)).mT
    forward = (u, x_dbl, dt_weight, dt_bias, A_log, D)
    backward = (u_b, x_dbl_b, dt_weight_b, dt_bias_b, A_b_log, D_b)
    outputs, checkpoints = [], []
    for operands, reverse in ((forward, False), (backward, True)):
        with torch.autocast(u.device.type, enabled=False):
            inputs = project(*operands)
        out, _, entry_states = selective_scan(*inputs, gate, operands[3], True, reverse, checkpoint_every)
        outputs.append(out)
        checkpoints.append(entry_states)
    y = scale * (outputs[0] + outputs[1])
    return y.mT.to(u.dtype).contiguous(), torch.stack(checkpoints)


def bidirectional_scan_backward(
    dy: Tensor,
    u: Tensor,
    x_dbl: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    u_b: Tensor,
    x_dbl_b: Tensor,
    dt_weight_b: Tensor,
    dt_bias_b: Tensor,
    A_b_log: Tensor,
    D_b: Tensor,
    z: Tensor,
    checkpoints: Tensor,
    scale: float,
    checkpoint_every: int,
) -> tuple[Tensor, ...]:
    """Return the gradients of the twelve operands in their order, and dz."""
    acc = accumulate_dtype(u.dtype)
    gate, dout = z.to(acc).mT, scale * dy.to(acc).mT
    forward = (u, x_dbl, dt_weight, dt_bias, A_log, D)
    backward = (u_b, x_dbl_b, dt_weight_b, dt_bias_b, A_b_log, D_b)
    grads: list[Tensor] = []
    dz = torch.zeros_like(gate)
    for operands, reverse in ((forward, False), (backward, True)):
        x_dbl, dt_weight, dt_bias = operands[1:4]
        with torch.autocast(u.device.type, enabled=False):
            scan_inputs = project(*operands)
        A = scan_inputs[2]
        du, ddelta, dA, dB, dC, dD, dz_dir, ddt_bias = selective_scan_backward(
            dout, None, *scan_inputs, gate, dt_bias, checkpoints[int(reverse)], True, reverse, checkpoint_every
        )
        dz += dz_dir
        dt = x_dbl[..., : dt_weight.shape[1]].to(acc)
        with torch.autocast(u.device.type, enabled=False):
            ddt = ddelta.mT @ dt_weight
            ddt_weight = ddelta.transpose(0, 1).flatten(1) @ dt.flatten(0, 1)
        dx_dbl = torch.cat([ddt, dB.mT, dC.mT], dim=-1)
        grads += [du.mT.to(u.dtype).contiguous(), dx_dbl.to(u.dtype), ddt_weight, ddt_bias, dA * A, dD]
    return *grads, dz.mT.to(u.dtype).contiguous()


def project(
    u: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One direction's operands as the channel-first inputs u, delta, A, B, C, D of a selective scan."""
    acc = accumulate_dtype(u.dtype)
    d_state = A_log.shape[1]
    dt, B, C = x_dbl.to(acc).split([dt_weight.shape[1], d_state, d_state], dim=-1)
    return u.to(acc).mT, (dt @ dt_weight.T).mT, -torch.exp(A_log), B.mT, C.mT, D
