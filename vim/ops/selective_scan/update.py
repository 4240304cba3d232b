"""`selective_state_update`: one step of the selective scan, for generation token by token."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vim.ops.common.checks import check_floating, check_memory, check_operand, check_tensor
from vim.ops.common.eager import needs_grad
from vim.ops.selective_scan.interface import selective_scan


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
    *,
    backend: str | None = None,
) -> Tensor:
    """Run one token of Mamba's selective scan, and update the state in place.

        state = exp(dt A) state + dt B x;    out = (<C, state> + D x) silu(z)

    With heads, as in Mamba-2, "dim" below is "nheads, dim"; B and C then may have groups: consecutive
    nheads / ngroups heads share a group.

    Args:
        state: State, (batch, dim, d_state); any floating dtype, float32 for exact results.
        x: Input, (batch, dim); float32, bfloat16, float16 or float64.
        dt: Step size, (batch, dim).
        A: Decay, real, (dim, d_state).
        B: Input map, (batch, d_state); with heads (batch, d_state) or (batch, ngroups, d_state).
        C: Output map, in a shape of `B`.
        D: Skip connection, (dim,); `None` leaves the term out.
        z: Gate, (batch, dim); `None` leaves the gate out.
        dt_bias: Added to `dt` before softplus, (dim,).
        dt_softplus: Apply softplus to `dt`.
        backend: Name of a backend (see `available_backends`), or `None` for the fastest that applies.

    Returns:
        Same shape and dtype as `x`, as from `selective_scan` over the whole sequence.

    Raises:
        ValueError: A shape or device disagrees with `state`; the message names both values.
        TypeError: An argument is not a floating tensor.
        RuntimeError: The named backend cannot run here, or the memory of an argument was freed; the message says why.

    Source: arguments of mamba-ssm's `selective_state_update`.
    """
    axes = "(batch, dim, d_state) or (batch, nheads, dim, d_state)"
    check_floating("state", check_tensor("state", state, axes))
    if state.dim() not in (3, 4):
        raise ValueError(f"state must be {axes}, got shape {tuple(state.shape)}")
    batch, *channels, d_state = state.shape
    per_channel = "dim" if len(channels) == 1 else "nheads, dim"
    check_operand("x", x, (batch, *channels), f"(batch, {per_channel})", state, "state")
    check_operand("dt", dt, x.shape, f"(batch, {per_channel})", state, "state")
    check_operand("A", A, (*channels, d_state), f"({per_channel}, d_state)", state, "state")
    for name, value in (("B", B), ("C", C)):
        _check_map(name, value, state)
    for name, optional in (("D", D), ("dt_bias", dt_bias)):
        if optional is not None:
            check_operand(name, optional, channels, f"({per_channel},)", state, "state")
    if z is not None:
        check_operand("z", z, x.shape, f"(batch, {per_channel})", state, "state")

    tensors = {"state": state, "x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    for name, tensor in tensors.items():
        check_memory(name, tensor)

    # The scan takes its inputs in one dtype.
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in (dt, B, C, z) if t is not None), x.dtype)

    def token(t: Tensor) -> Tensor:
        """Return a sequence of one token, (batch, channels, 1)."""
        return t.flatten(1)[..., None].to(dtype)

    before = state.flatten(1, -2)
    if needs_grad(*tensors.values()):
        before = before.clone()  # a backward pass needs it, and `state` is overwritten
    out, last_state = selective_scan(
        token(x),
        token(dt),
        A.flatten(0, -2),
        B[..., None].to(dtype),
        C[..., None].to(dtype),
        None if D is None else D.flatten(),
        None if z is None else token(z),
        None if dt_bias is None else dt_bias.flatten(),
        dt_softplus,
        True,
        backend=backend,
        initial_state=before,
    )
    state.copy_(last_state.reshape(state.shape))
    return out.reshape(x.shape).to(x.dtype)


def _check_map(name: str, B: Tensor, state: Tensor) -> None:
    """Raise unless B or C is (batch, d_state), or with heads (batch, ngroups, d_state) where groups divide heads."""
    batch, d_state = state.shape[0], state.shape[-1]
    check_tensor(name, B, "(batch, d_state)")
    if state.dim() == 4 and B.dim() == 3:
        groups, heads = B.shape[1], state.shape[1]
        check_operand(name, B, (batch, groups, d_state), "(batch, ngroups, d_state)", state, "state")
        if groups == 0 or heads % groups:
            raise ValueError(f"{name} must have ngroups that divide nheads = {heads}, got {groups} groups")
    else:
        check_operand(name, B, (batch, d_state), "(batch, d_state)", state, "state")
