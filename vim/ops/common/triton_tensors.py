"""Helpers that kernels in Triton share: launches, and reads and writes of tensors of any strides."""

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
    """B or C as kernels take it: a tensor, its strides, and the number of channels that share a group.

    In a constant B or C, (dim, d_state), each channel is a group.
    """

    base: Tensor
    batch: int
    group: int
    state: int
    token: int
    channels: int


class Rows(NamedTuple):
    """A tensor (batch, channel, token) as kernels take it: the tensor and its strides."""

    base: Tensor
    batch: int
    channel: int
    token: int


def rows(tensor: Tensor) -> Rows:
    """Return a tensor (batch, channel, token) as kernels take it."""
    batch, channel, token = tensor.stride()
    return Rows(tensor, batch, channel, token)


def optional_rows(tensor: Tensor | None) -> Rows | None:
    """Return `rows(tensor)`, or `None` for `None`."""
    return None if tensor is None else rows(tensor)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Return `tensor.contiguous()`, or `None` for `None`."""
    return None if tensor is None else tensor.contiguous()


def channels_last(A: Tensor) -> tuple[Tensor, int, int]:
    """Return (dim, numbers) as kernels take it: contiguous as (numbers, dim), and the strides of dim and numbers."""
    return A.T.contiguous(), 1, A.shape[0]


def common_alignment(strides: Iterable[int]) -> int:
    """Return the widest load of B and C, up to 8 numbers, that divides all of these strides."""
    return math.gcd(8, *strides)


@functools.cache  # a fact of the hardware
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
    """Load a block of channels at one token, in the stored dtype; 0 where masked."""
    start = rows.base + batch.to(tl.int64) * rows.batch + token * rows.token
    return tl.load(start + channels * rows.channel, mask=mask, other=0.0)


@triton.jit
def store_rows(rows, batch, channels, token, values, mask):
    """Store a block of channels at one token; the inverse of `load_rows`."""
    start = rows.base + batch.to(tl.int64) * rows.batch + token * rows.token
    tl.store(start + channels * rows.channel, values.to(rows.base.dtype.element_ty), mask=mask)


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)), accurate in float32 for small results too: log1p(e) by its atanh series, 0 < e <= 1."""
    e = tl.exp(-tl.abs(x))
    s = e / (2 + e)
    q = s * s
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
    return tl.maximum(x, 0.0) + 2 * s * series


@triton.jit
def load_map(map, batch, first, token, START: tl.constexpr, SIZE: tl.constexpr, ALIGN: tl.constexpr):
    """Load `SIZE` numbers from `START` on at one token, in the stored dtype, padded with 0 to a power of two.

    Every thread loads all of them, several at a time if `ALIGN`, a divisor of the strides, allows it.
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
    """Return pointers to each state (padded to a power of two) of each channel, and a mask of those that exist.

    The compiler should put one channel on a lane and all of a channel's states into its thread. It derives that layout
    from loads and stores. So the state index is multiplied by 1 at run time (no grid here has a third axis), which
    hides that states are contiguous. And 0 is added at run time, which hides alignment, so that no thread takes several
    channels. Tensors whose last axis is channels get the layout this way in every version of Triton.
    """
    one = tl.num_programs(2)
    index = tl.arange(0, triton.next_power_of_2(STATES))[:, None]
    at = base + (one - 1) + index * (state_stride * one) + channels[None, :] * channel_stride
    return at, (index < STATES) & inside[None, :]


@triton.jit
def load_states(base, channel_stride, state_stride, channels, inside, STATES: tl.constexpr):
    """Load each state of each channel of the block, (states padded to a power of two, channels); 0 outside."""
    at, mask = at_states(base, channel_stride, state_stride, channels, inside, STATES)
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_states(base, channel_stride, state_stride, values, channels, inside, STATES: tl.constexpr):
    """Store each state of each channel of the block; the inverse of `load_states`."""
    at, mask = at_states(base, channel_stride, state_stride, channels, inside, STATES)
    tl.store(at, values, mask=mask)


@triton.jit
def place_tile(seqlen, dim, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return a program's batch element, tokens (TOKENS, 1), channels (1, CHANNELS), and a mask of those that exist.

    Programs are (batch elements times blocks of tokens, blocks of channels).
    """
    per_batch = tl.cdiv(seqlen, TOKENS)
    batch, tile = tl.program_id(0) // per_batch, tl.program_id(0) % per_batch
    tokens = (tile * TOKENS + tl.arange(0, TOKENS))[:, None]
    channels = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    return batch, tokens, channels, (tokens < seqlen) & (channels < dim)


@triton.jit
def load_tile(rows, batch, tokens, channels, mask):
    """Load a tile in float32; 0 where masked."""
    start = rows.base + batch.to(tl.int64) * rows.batch
    return tl.load(start + tokens * rows.token + channels * rows.channel, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(rows, batch, tokens, channels, values, mask):
    """Store a tile; the inverse of `load_tile`."""
    start = rows.base + batch.to(tl.int64) * rows.batch
    at = start + tokens * rows.token + channels * rows.channel
    tl.store(at, values.to(rows.base.dtype.element_ty), mask=mask)
