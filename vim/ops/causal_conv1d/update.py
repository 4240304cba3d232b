"""`causal_conv1d_update`: the convolution of new tokens, after a state that holds the tokens before them."""

from __future__ import annotations

import torch
from torch import Tensor

from vim.ops.causal_conv1d.interface import causal_conv1d, check_filter
from vim.ops.common.checks import check_activation, check_integers, check_length, check_memory, check_operand


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Convolve new tokens with the tokens in `conv_state` before them, and write them to `conv_state`, in place.

    Args:
        x: The new tokens, (batch, dim) for one or (batch, dim, len); float32, bfloat16, float16 or float64.
        conv_state: The tokens before, the latest one last, (batch, dim, state_len) with state_len >= width - 1 and
            >= 1; zeros at the start of a sequence. Any floating dtype.
        weight: Filters, (dim, width).
        bias: Per channel, (dim,).
        activation: "silu" (or its other name "swish"), or `None`.
        cache_seqlens: Number of tokens that each sequence had before, (batch,), int32 or int64. `conv_state` then is a
            circular buffer: token number i is at i % state_len.
        conv_state_indices: Row of `conv_state` of each element of `x`, (batch,), int32 or int64, no row twice;
            `conv_state` may have any number of rows. A negative index marks padding: its output is 0, and no state
            changes.
        backend: Name of a backend (see `available_backends`), or `None` for the fastest that applies.

    Returns:
        Same shape and dtype as `x`, as from `causal_conv1d` over the whole sequence.

    Raises:
        ValueError: A shape or device disagrees with `x`, `len` is 0, `conv_state` is shorter than width - 1, or
            `activation` is unknown.
        TypeError: An argument has a dtype that it must not have.
        RuntimeError: The named backend cannot run here, or the memory of an argument was freed; the message says why.

    Source: arguments of causal-conv1d's `causal_conv1d_update`.
    """
    if isinstance(x, Tensor) and x.dim() == 2:
        arguments = (conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
        return causal_conv1d_update(x[..., None], *arguments, backend=backend)[..., 0]
    check_activation("x", x, "(batch, dim, len)")
    check_length("x", x.shape[2])
    check_filter("weight", weight, x.shape[1], x)
    history = weight.shape[1] - 1
    _check_state(conv_state, x, history, conv_state_indices is not None)
    for name, value in (("cache_seqlens", cache_seqlens), ("conv_state_indices", conv_state_indices)):
        if value is not None:
            check_memory(name, check_integers(name, value, (x.shape[0],), "(batch,)", x, "x"))
    for name, tensor in (("x", x), ("conv_state", conv_state)):
        check_memory(name, tensor)
    states = conv_state if conv_state_indices is None else conv_state[conv_state_indices.long().clamp_min(0)]
    before, after = _roll(states, x, history) if cache_seqlens is None else _turn(states, x, history, cache_seqlens)
    out = causal_conv1d(x, weight, bias, activation, initial_states=before, backend=backend)
    if conv_state_indices is None:
        conv_state.copy_(after)
        return out
    real = conv_state_indices >= 0
    _write_rows(conv_state, conv_state_indices.long(), real, torch.where(real.any(), after, states))
    return out.masked_fill(~real[:, None, None], 0)


def _check_state(conv_state: Tensor, x: Tensor, history: int, indexed: bool) -> None:
    axes = "(rows, dim, state_len)" if indexed else "(batch, dim, state_len)"
    batch, dim, _ = x.shape
    is_state = isinstance(conv_state, Tensor) and conv_state.dim() == 3
    rows, state_len = (conv_state.shape[0], conv_state.shape[2]) if is_state else (batch, history)
    check_operand("conv_state", conv_state, (rows if indexed else batch, dim, state_len), axes, x, "x")
    if state_len < max(history, 1):
        raise ValueError(
            f"conv_state must have state_len >= 1 and >= width - 1 = {history}, got {tuple(conv_state.shape)}"
        )


def _roll(states: Tensor, x: Tensor, history: int) -> tuple[Tensor, Tensor]:
    """Return the `history` tokens before `x`, and the states after it, with the latest token last."""
    state_len = states.shape[2]
    joined = torch.cat([states, x.to(states.dtype)], -1)
    return states[..., state_len - history :], joined[..., x.shape[2] :]


def _turn(states: Tensor, x: Tensor, history: int, cache_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the `history` tokens before `x`, and the states after it, of circular buffers."""
    dim, state_len, seqlen = *states.shape[1:], x.shape[2]

    def places(first: int, last: int) -> Tensor:
        """Return where tokens lie, counted from the first new one, (batch, dim, last - first)."""
        tokens = torch.arange(first, last, device=x.device) + cache_seqlens[:, None]
        return tokens.remainder(state_len)[:, None].expand(-1, dim, -1)

    kept = min(seqlen, state_len)
    before = states.gather(2, places(-history, 0))
    return before, states.scatter(2, places(seqlen - kept, seqlen), x[..., seqlen - kept :].to(states.dtype))


def _write_rows(conv_state: Tensor, rows: Tensor, real: Tensor, values: Tensor) -> None:
    """Write the values of the real rows, without asking the device how many there are.

    Padding writes again what the first real row writes, or what is there in row 0 if no row is real.
    """
    own = torch.arange(len(rows), device=rows.device)
    source = torch.where(real, own, real.int().argmax())
    conv_state.index_copy_(0, rows[source].clamp_min(0), values[source])
