"""The functions of causal-conv1d, on `vim.ops`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vim import ops


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | str | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str | None = None,
) -> Any:
    """Convolve causally, as causal-conv1d 1.0 to 1.7; see `vim.ops.causal_conv1d`.

    Args:
        x: (batch, dim, len).
        weight: (dim, width).
        bias: (dim,).
        seq_idx: Number of the sequence of each token, (batch, len). The fourth argument of causal-conv1d 1.0 and 1.1
            is the activation, so a string here is taken for it.
        initial_states: Tokens before the first, (batch, dim, width - 1).
        return_final_states: Also return the last width - 1 tokens.
        final_states_out: Tensor that takes them.
        activation: "silu", "swish" or `None`.
        backend: See `vim.ops.available_backends`; not an argument of causal-conv1d.

    Returns:
        Like `x`, and with `return_final_states` the final states, (batch, dim, width - 1).
    """
    if isinstance(seq_idx, str):
        seq_idx, activation = None, seq_idx
    return ops.causal_conv1d(
        x,
        weight,
        bias,
        activation,
        seq_idx=seq_idx,
        initial_states=initial_states,
        return_final_states=return_final_states,
        final_states_out=final_states_out,
        backend=backend,
    )


def causal_conv1d_ref(*arguments: Any, **named: Any) -> Any:
    """Run `causal_conv1d_fn` on the reference backend."""
    return causal_conv1d_fn(*arguments, backend="reference", **named)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | bool | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Convolve new tokens and update the state in place; see `vim.ops.causal_conv1d_update`.

    Args:
        x: (batch, dim) or (batch, dim, len).
        conv_state: Tokens before these, (batch, dim, state_len) with state_len >= width - 1.
        weight: (dim, width).
        bias: (dim,).
        activation: "silu", "swish" or `None`; True and False mean "silu" and `None`.
        cache_seqlens: Tokens before these, (batch,); `conv_state` is then a circular buffer.
        conv_state_indices: Row of `conv_state` of each sequence, (batch,).
        backend: See `vim.ops.available_backends`; not an argument of causal-conv1d.
    """
    if isinstance(activation, bool):
        activation = "silu" if activation else None
    return ops.causal_conv1d_update(
        x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices, backend=backend
    )


def causal_conv1d_update_ref(*arguments: Any, **named: Any) -> Tensor:
    """Run `causal_conv1d_update` on the reference backend."""
    return causal_conv1d_update(*arguments, backend="reference", **named)
