"""Checks of `selective_scan`'s arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from vim.ops.common.checks import (
    FLOATING,
    check_activation,
    check_device,
    check_length,
    check_like,
    check_operand,
    check_seq_idx,
    check_tensor,
)
from vim.ops.common.layout import accumulate_dtype


def check_scan_inputs(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the inputs fit together."""
    check_activation("u", u, "(batch, dim, len)")
    dim, seqlen = u.shape[1:]
    check_length("u", seqlen)
    check_like("delta", delta, u.shape, "(batch, dim, len)", u, "u")
    _check_decay(A, u)
    _check_map("B", B, A, u)
    _check_map("C", C, A, u)
    if D is not None:
        check_operand("D", D, (dim,), "(dim,)", u, "u")
    if z is not None:
        check_like("z", z, u.shape, "(batch, dim, len)", u, "u")
    if delta_bias is not None:
        check_operand("delta_bias", delta_bias, (dim,), "(dim,)", u, "u")


def check_segments(A: Tensor, u: Tensor, initial_state: Tensor | None, seq_idx: Tensor | None) -> None:
    """Raise ValueError or TypeError, naming the argument, unless initial state and sequence indices fit the inputs."""
    if initial_state is not None:
        check_state("initial_state", initial_state, A, u, "u")
    if seq_idx is not None:
        check_seq_idx(seq_idx, u, "u")


def check_state(name: str, state: Tensor, A: Tensor, like: Tensor, like_name: str) -> None:
    """Raise unless `state` is (batch, dim, d_state), real or complex as A is, on the device of `like`."""
    check_tensor(name, state, "(batch, dim, d_state)")
    shape = (like.shape[0], *A.shape)
    if tuple(state.shape) != shape:
        raise ValueError(f"{name} must be (batch, dim, d_state) = {shape}, got {tuple(state.shape)}")
    if state.is_complex() != A.is_complex() or not (state.is_complex() or state.dtype in FLOATING):
        kind = "complex" if A.is_complex() else "floating"
        raise TypeError(f"{name} must be {kind} as A is {A.dtype}, got {state.dtype}")
    check_device(name, state, like, like_name)


def _check_decay(A: Tensor, u: Tensor) -> None:
    check_tensor("A", A, "(dim, d_state)")
    if A.dim() != 2 or A.shape[0] != u.shape[1] or A.shape[1] == 0:
        raise ValueError(f"A must be (dim, d_state) with dim = {u.shape[1]} as in u, got {tuple(A.shape)}")
    if A.dtype not in (*FLOATING, torch.complex64, torch.complex128):
        raise TypeError(f"A must be floating or complex, got {A.dtype}")
    check_device("A", A, u, "u")


def _check_map(name: str, B: Tensor, A: Tensor, u: Tensor) -> None:
    """Raise unless B or C is (dim, d_state), (batch, d_state, len) or (batch, groups, d_state, len)."""
    kinds = "(dim, d_state), (batch, d_state, len) or (batch, groups, d_state, len)"
    check_tensor(name, B, kinds)
    batch, dim, seqlen = u.shape
    d_state = A.shape[1]
    # With a complex A the last axis of B holds (re, im) pairs.
    length = 2 * seqlen if A.is_complex() else seqlen
    if B.dim() == 2:
        _check_constant_map(name, B, A)
        check_device(name, B, u, "u")
    elif B.dim() == 3:
        check_like(name, B, (batch, d_state, length), "(batch, d_state, len)", u, "u")
    elif B.dim() == 4:
        groups = B.shape[1]
        if groups == 0 or dim % groups:
            raise ValueError(f"{name} must have groups that divide dim = {dim}, got {groups} groups")
        check_like(name, B, (batch, groups, d_state, length), "(batch, groups, d_state, len)", u, "u")
    else:
        raise ValueError(f"{name} must be {kinds}, got shape {tuple(B.shape)}")


def _check_constant_map(name: str, B: Tensor, A: Tensor) -> None:
    if B.shape != A.shape:
        raise ValueError(f"{name} must be (dim, d_state) = {tuple(A.shape)}, got {tuple(B.shape)}")
    if B.is_complex() != A.is_complex() or not (B.is_complex() or B.dtype in FLOATING):
        kind = "complex" if A.is_complex() else "floating"
        raise TypeError(f"{name} must be {kind} as A is {A.dtype}, got {B.dtype}")


def decay_dtype(A: Tensor, u: Tensor) -> torch.dtype:
    """Return the dtype in which A, and a constant B or C, enter the kernels."""
    real = accumulate_dtype(u.dtype)
    if not A.is_complex():
        return real
    return torch.complex128 if real == torch.float64 else torch.complex64
