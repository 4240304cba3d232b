"""What kernels in Triton share: how they read and write tensors of any strides."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Map(NamedTuple):
    """B or C: a tensor, its strides, and how many channels share a group.

    A constant one, (dim, d_state), is a group for each channel.
    """

    base: Tensor
    batch: int
    group: int
    state: int
    token: int
    channels: int


class Rows(NamedTuple):
    """A number for each batch element, channel and token: a tensor and its strides."""

    base: Tensor
    batch: int
    channel: int
    token: int


def rows(tensor: Tensor) -> Rows:
    """A tensor (batch, channel, token) as kernels take it."""
    batch, channel, token = tensor.stride()
    return Rows(tensor, batch, channel, token)


def optional_rows(tensor: Tensor | None) -> Rows | None:
    """The same, or none."""
    return None if tensor is None else rows(tensor)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor, if there is one, dense."""
    return None if tensor is None else tensor.contiguous()


def channels_last(A: Tensor) -> tuple[Tensor, int, int]:
    """(dim, numbers) as kernels take it: dense as (numbers, dim), and the strides of dim and of numbers."""
    return A.T.contiguous(), 1, A.shape[0]


def common_alignment(strides: Iterable[int]) -> int:
    """The widest load of B and C, up to 8 numbers, that divides all of these strides."""
    return math.gcd(8, *strides)


@functools.cache
def lanes(device: torch.device) -> int:
    """Return how many threads a GPU runs in lockstep; 32 in Triton's interpreter."""
    if device.type == "cuda" and torch.cuda.is_available():
        return getattr(torch.cuda.get_device_properties(device), "warp_size", 32)
    return 32


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which kernels are launched on the GPU that holds the tensor."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


@triton.jit
def load_rows(rows, batch, channels, token, mask):
    """The numbers of a block of channels at one token, as they are stored; 0 where masked."""
    start = rows.base + batch.to(tl.int64) * rows.batch + token * rows.token
    return tl.load(start + channels * rows.channel, mask=mask, other=0.0)


@triton.jit
def store_rows(rows, batch, channels, token, values, mask):
    """The opposite of `load_rows`."""
    start = rows.base + batch.to(tl.int64) * rows.batch + token * rows.token
    tl.store(start + channels * rows.channel, values.to(rows.base.dtype.element_ty), mask=mask)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), accurate to float32 for small results too: log1p(e) by its atanh series, 0 < e <= 1."""
    e = tl.exp(-tl.abs(x))
    s = e / (2 + e)
    q = s * s
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
    return tl.maximum(x, 0.0) + 2 * s * series


@triton.jit
def load_map(map, batch, first, token, START: tl.constexpr, SIZE: tl.constexpr, ALIGN: tl.constexpr):
    """`SIZE` numbers from `START` on at one token, as they are stored, padded to a power of two with 0.

    Every thread loads all of them, several at a time where `ALIGN`, a divisor of the strides, allows it.
    """
    PADDED: tl.constexpr = triton.next_power_of_2(SIZE)
    index = tl.arange(0, PADDED)
    offset = tl.multiple_of(batch.to(tl.int64) * map.batch, ALIGN) + tl.multiple_of(token * map.token, ALIGN)
    offset += tl.multiple_of((first // map.channels).to(tl.int64) * map.group, ALIGN)
    at = map.base + offset + (index + START) * map.state
    if PADDED == SIZE:
        values = tl.load(at)
    else:
        values = tl.load(at, mask=index < SIZE, other=0.0)
    return values


@triton.jit
def at_states(base, channel_stride, state_stride, channels, inside, STATES: tl.constexpr):
    """Pointers to a number for each state (padded to a power of two) and channel, and which of them exist.

    The compiler shall lay channels over lanes, one each, and a channel's states into one thread. It goes by what loads
    and stores look like: states are multiplied by a 1 that it cannot know (no grid here has a third axis), so that they
    are not contiguous, and a 0 that it cannot know is added, so that no alignment allows several channels in a thread.
    Tensors with channels in the last place have the layout, therefore, in every version of Triton.
    """
    one = tl.num_programs(2)
    index = tl.arange(0, triton.next_power_of_2(STATES))[:, None]
    at = base + (one - 1) + index * (state_stride * one) + channels[None, :] * channel_stride
    return at, (index < STATES) & inside[None, :]


@triton.jit
def load_states(base, channel_stride, state_stride, channels, inside, STATES: tl.constexpr):
    """A number for each state and channel of the block, (states padded to a power of two, channels); 0 outside."""
    at, mask = at_states(base, channel_stride, state_stride, channels, inside, STATES)
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_states(base, channel_stride, state_stride, values, channels, inside, STATES: tl.constexpr):
    """The opposite of `load_states`."""
    at, mask = at_states(base, channel_stride, state_stride, channels, inside, STATES)
    tl.store(at, values, mask=mask)


@triton.jit
def place_tile(seqlen, dim, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """Batch element, tokens (TOKENS, 1), channels (1, CHANNELS) and which of them exist.

    Programs are (batch elements times blocks of tokens, blocks of channels).
    """
    per_batch = tl.cdiv(seqlen, TOKENS)
    batch, tile = tl.program_id(0) // per_batch, tl.program_id(0) % per_batch
    tokens = (tile * TOKENS + tl.arange(0, TOKENS))[:, None]
    channels = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    return batch, tokens, channels, (tokens < seqlen) & (channels < dim)


@triton.jit
def load_tile(rows, batch, tokens, channels, mask):
    """The numbers of a tile, in float32; 0 where masked."""
    start = rows.base + batch.to(tl.int64) * rows.batch
    return tl.load(start + tokens * rows.token + channels * rows.channel, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(rows, batch, tokens, channels, values, mask):
    """The opposite of `load_tile`."""
    start = rows.base + batch.to(tl.int64) * rows.batch
    at = start + tokens * rows.token + channels * rows.channel
    tl.store(at, values.to(rows.base.dtype.element_ty), mask=mask)
