"""`causal_conv1d`, the function for users."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from vim.ops.backends.registry import resolve_backend
from vim.ops.causal_conv1d import register as register
from vim.ops.common.checks import (
    check_activation,
    check_choice,
    check_length,
    check_memory,
    check_operand,
    check_seq_idx,
)
from vim.ops.common.layout import accumulate_dtype, as_dtype, like_layout
from vim.ops.common.segments import number_sequences


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    reverse: bool = False,
    backend: str | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: Literal[False] = False,
    final_states_out: None = None,
) -> Tensor: ...


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    reverse: bool = False,
    backend: str | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool,
    final_states_out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    reverse: bool = False,
    backend: str | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve each channel with its own causal filter.

        out[l] = activation(bias + sum_k weight[k] x[l - (width - 1) + k])

    Args:
        x: Input, (batch, dim, len); float32, bfloat16, float16 or float64. Any strides; the output is channel-last in
            memory where `x` is.
        weight: Filters, (dim, width).
        bias: Per channel, (dim,).
        activation: "silu" (or its other name "swish"), or `None`.
        reverse: Look at the tokens after each token instead of before it, without a flipped copy.
        backend: Name of a backend (see `available_backends`), or `None` for the fastest that applies.
        seq_idx: Index of the sequence of each token, (batch, len), int32, for several sequences in one row. Where the
            index changes, the filter sees zeros: each sequence gets the result that it has alone. `initial_states`
            belong to the first sequence of a row, and the final states to the last one.
        initial_states: The tokens before the first one, (batch, dim, width - 1), such as the final states of an
            earlier part of the sequence; `None` is zeros. With `reverse`, the tokens after the last one.
        return_final_states: Also return the last width - 1 tokens, with `reverse` the first ones.
        final_states_out: Tensor that the final states are written to, (batch, dim, width - 1).

    Returns:
        Same shape and dtype as `x`; arithmetic is float32 (float64 for float64 input). With `return_final_states` also
        the final states, (batch, dim, width - 1), in the dtype of `x`: a tensor of their own, or `final_states_out`.

    Raises:
        ValueError: A shape or device disagrees with `x`, `len` is 0, `activation` is unknown, or `final_states_out` is
            given without `return_final_states`.
        TypeError: An argument is not a floating tensor, or `seq_idx` is not int32.
        RuntimeError: The named backend cannot run here, or the memory of an argument was freed; the message says why.

    Source: Gu and Dao 2023, arXiv:2312.00752, section 3.4; arguments of causal-conv1d's `causal_conv1d_fn`.
    """
    check_activation("x", x, "(batch, dim, len)")
    check_length("x", x.shape[-1])
    check_filter("weight", weight, x.shape[1], x)
    if bias is not None:
        check_operand("bias", bias, (x.shape[1],), "(dim,)", x, "x")
    check_choice("activation", activation, (None, "silu", "swish"))
    history, seqlen = weight.shape[1] - 1, x.shape[2]
    state_shape = (*x.shape[:2], history)
    if seq_idx is not None:
        check_seq_idx(seq_idx, x, "x")
    if initial_states is not None:
        check_operand("initial_states", initial_states, state_shape, "(batch, dim, width - 1)", x, "x")
        for name, tensor in (("x", x), ("initial_states", initial_states), ("seq_idx", seq_idx)):
            check_memory(name, tensor)
        if seq_idx is not None:
            first = seq_idx[:, -1:] if reverse else seq_idx[:, :1]
            seq_idx = _join(first.expand(-1, history), seq_idx, reverse)
        x = _join(initial_states.to(x.dtype), x, reverse)
    if final_states_out is not None:
        check_operand("final_states_out", final_states_out, state_shape, "(batch, dim, width - 1)", x, "x")
        if not return_final_states:
            raise ValueError("final_states_out must be None where return_final_states is False")
    tensors = (x, *as_dtype(accumulate_dtype(x.dtype), ("weight", "bias"), (weight, bias)))
    if seq_idx is None:
        op = resolve_backend("causal_conv1d", backend, x)
    else:
        op = resolve_backend("segmented_conv1d", backend, x)
        tensors = (*tensors, seq_idx)
    out = op(*tensors, activation is not None, reverse)
    if initial_states is not None:
        out = like_layout(out[..., :seqlen] if reverse else out[..., history:], x)
    if not return_final_states:
        return out
    for name, tensor in (("x", x), ("seq_idx", seq_idx), ("final_states_out", final_states_out)):
        check_memory(name, tensor)
    final_states = _final_states(x, seq_idx, history, reverse)
    return out, final_states if final_states_out is None else final_states_out.copy_(final_states)


def _join(before: Tensor, x: Tensor, reverse: bool) -> Tensor:
    """Return `x` (..., len) after `before` in scan order, channel-last in memory where `x` is."""
    parts = [x, before] if reverse else [before, x]
    if x.dim() == 3 and x.stride(1) == 1 and x.stride(2) != 1:
        return torch.cat([part.mT for part in parts], 1).mT
    return torch.cat(parts, -1)


def _final_states(x: Tensor, seq_idx: Tensor | None, history: int, reverse: bool) -> Tensor:
    """Return a copy of the last `history` tokens in scan order; zeros where there is none of the last sequence."""
    kept = slice(history) if reverse else slice(max(x.shape[-1] - history, 0), None)
    states = x[..., kept]
    if seq_idx is not None:
        numbers = number_sequences(seq_idx[:, kept])
        last = numbers[:, :1] if reverse else numbers[:, -1:]
        states = states.masked_fill((numbers != last)[:, None], 0)
    missing = history - states.shape[-1]
    return F.pad(states, (0, missing) if reverse else (missing, 0)) if missing else states.clone()


def check_filter(name: str, weight: Tensor, dim: int, x: Tensor) -> None:
    """Raise unless `weight` is (dim, width) with at least one tap, on the device of `x`."""
    width = weight.shape[1] if isinstance(weight, Tensor) and weight.dim() == 2 else 0
    check_operand(name, weight, (dim, width), "(dim, width)", x, "x")
    if width == 0:
        raise ValueError(f"{name} must have at least one tap, got shape {tuple(weight.shape)}")
