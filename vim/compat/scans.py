"""The scans of mamba-ssm, and of the fork that Vim's original brings, on `vim.ops`."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vim import ops


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    backend: str | None = None,
) -> Any:
    """Run the selective scan, as mamba-ssm's function; see `vim.ops.selective_scan`.

    Unlike `vim.ops.selective_scan`, this function converts `delta`, `z` and input-dependent B and C to the dtype of
    `u`.
    """
    B, C = (t if t.dim() == 2 else t.to(u.dtype) for t in (B, C))
    z = None if z is None else z.to(u.dtype)
    return ops.selective_scan(
        u, delta.to(u.dtype), A, B, C, D, z, delta_bias, delta_softplus, return_last_state, backend=backend
    )


def selective_scan_ref(*arguments: Any, **named: Any) -> Any:
    """Run `selective_scan_fn` on the reference backend."""
    return selective_scan_fn(*arguments, backend="reference", **named)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Run one token of the scan and update the state in place; see `vim.ops.selective_state_update`.

    `state_batch_indices`, (batch,), names the row of `state` of each sequence, no row twice.
    """
    rows = state if state_batch_indices is None else state[state_batch_indices.long()]
    out = ops.selective_state_update(rows, x, dt, A, B, C, D, z, dt_bias, dt_softplus, backend=backend)
    if state_batch_indices is not None:
        state[state_batch_indices.long()] = rows
    return out


def selective_state_update_ref(*arguments: Any, **named: Any) -> Tensor:
    """Run `selective_state_update` on the reference backend."""
    return selective_state_update(*arguments, backend="reference", **named)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> Tensor:
    """Run a Mamba mixer after `in_proj`: convolution, projections, scan, gate and `out_proj`.

    Args:
        xz: Output of `in_proj`, (batch, 2 dim, len).
        conv1d_weight: (dim, 1, width).
        conv1d_bias: (dim,).
        x_proj_weight: (dt_rank + 2 d_state, dim); without the rows of a B or C that is given.
        delta_proj_weight: (dim, dt_rank).
        out_proj_weight: (d_model, dim).
        out_proj_bias: (d_model,).
        A: (dim, d_state), real or complex.
        B, C: Maps as `vim.ops.selective_scan` takes them; `None` computes them from the tokens.
        D, delta_bias: (dim,).
        B_proj_bias, C_proj_bias: Added to the computed B and C, (d_state,).
        delta_softplus: Apply softplus to the step size.
        checkpoint_lvl: Has no effect: what the backward pass keeps depends on the op.
        b_rms_weight, c_rms_weight, dt_rms_weight: Scales of an RMSNorm on B, C and dt.
        b_c_dt_rms_eps: Added to the mean square in these norms.
        backend: See `vim.ops.available_backends`; not an argument of mamba-ssm.

    Returns:
        (batch, len, d_model).
    """
    norms = (dt_rms_weight, b_rms_weight, c_rms_weight)
    u, z, scan = _scan_inputs(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C,
        B_proj_bias, C_proj_bias, norms, b_c_dt_rms_eps, backend,
    )  # fmt: skip
    y = selective_scan_fn(u, *scan, D, z, delta_bias, delta_softplus, backend=backend)
    return F.linear(y.mT, out_proj_weight, out_proj_bias)


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
) -> Tensor:
    """Run `mamba_inner_fn` without `out_proj`, as the fork of mamba-ssm does; (batch, dim, len)."""
    u, z, scan = _scan_inputs(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias
    )
    return selective_scan_fn(u, *scan, D, z, delta_bias, delta_softplus)


def bimamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """Run `mamba_inner_fn` with a second scan, from the last token to the first with decay `A_b`, and add the two.

    Source: Zhu et al. 2024, arXiv:2401.09417, Table 4, "Bidirectional SSM".
    """
    u, z, (delta, A, B_map, C_map) = _scan_inputs(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C,
        B_proj_bias, C_proj_bias, backend=backend,
    )  # fmt: skip
    y: Any = 0
    for decay, reverse in ((A, False), (A_b, True)):
        y = y + ops.selective_scan(
            u, delta, decay, B_map, C_map, D, z, delta_bias, delta_softplus, reverse=reverse, backend=backend
        )
    return F.linear(y.mT, out_proj_weight, out_proj_bias)


def mamba_inner_ref(*arguments: Any, **named: Any) -> Tensor:
    """Run `mamba_inner_fn` on the reference backend."""
    return mamba_inner_fn(*arguments, backend="reference", **named)


def bimamba_inner_ref(*arguments: Any, **named: Any) -> Tensor:
    """Run `bimamba_inner_fn` on the reference backend."""
    return bimamba_inner_fn(*arguments, backend="reference", **named)


def _scan_inputs(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    B_proj_bias: Tensor | None,
    C_proj_bias: Tensor | None,
    norms: tuple[Tensor | None, ...] = (None, None, None),
    norm_eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return the scan's input, the gate, and (delta, A, B, C)."""
    x, z = xz.chunk(2, dim=1)
    u = ops.causal_conv1d(x, conv1d_weight.flatten(1), conv1d_bias, "silu", backend=backend)
    states = A.shape[1] * (2 if A.is_complex() else 1)
    rank = delta_proj_weight.shape[1]
    projected = F.linear(u.mT, x_proj_weight)
    widths = [rank, states if B is None else 0, states if C is None else 0]
    if projected.shape[-1] != sum(widths):
        raise ValueError(f"x_proj_weight must have dt_rank + B + C = {widths} rows, got {projected.shape[-1]}")
    # FalconMamba of transformers passes a scale longer than dt; mamba-ssm reads its front.
    dt, own_B, own_C = (
        part if scale is None else F.rms_norm(part, part.shape[-1:], scale[: part.shape[-1]].to(part.dtype), norm_eps)
        for part, scale in zip(projected.split(widths, dim=-1), norms, strict=True)
    )
    B = _as_map(own_B, B_proj_bias, A, u) if B is None else B
    C = _as_map(own_C, C_proj_bias, A, u) if C is None else C
    delta = F.linear(dt, delta_proj_weight.to(dt.dtype)).to(u.dtype).mT
    return u, z.to(u.dtype), (delta, A, B, C)


def _as_map(projected: Tensor, bias: Tensor | None, A: Tensor, u: Tensor) -> Tensor:
    """Return B or C, (batch, d_state, len), from its projection, (batch, len, d_state).

    With a complex A the projection has a (re, im) pair for each state, and the result one for each token.
    """
    projected = (projected if bias is None else projected + bias).to(u.dtype)
    if not A.is_complex():
        return projected.mT
    return projected.unflatten(-1, (-1, 2)).transpose(1, 2).flatten(2)
