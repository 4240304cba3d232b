"""The depthwise causal convolution in Triton; the bidirectional one builds on it.

A program takes a tile of tokens and channels and reads it once for each tap, mostly from a cache. The backward pass
first writes the gradient before SiLU in float32, with each program's share of the weights' gradients. Then it convolves
that gradient in the other direction, which gives the gradient of the input.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vim.ops.common.layout import empty_like_layout
from vim.ops.common.segments import number_sequences
from vim.ops.common.triton_tensors import Rows, contiguous, load_tile, on_device, place_tile, rows, store_tile

# Tokens and channels of a tile.
TOKENS, CHANNELS = 16, 128


@triton.jit
def load_tap(
    x, numbers, batch, tokens, channels, seqlen, dim, K: tl.constexpr, WIDTH: tl.constexpr, REVERSE: tl.constexpr
):
    """Load the input of tap `K` of the filter at each token; 0 outside of the token's sequence.

    `numbers` are the numbers of the tokens' sequences, or `None` where a row is one sequence.
    """
    seen = tokens + (WIDTH - 1 - K if REVERSE else K - (WIDTH - 1))
    there = (seen >= 0) & (seen < seqlen)
    if numbers is not None:
        row = numbers + batch.to(tl.int64) * seqlen
        own = tl.load(row + tokens, mask=tokens < seqlen, other=-1)
        there = there & (tl.load(row + seen, mask=there, other=-1) == own)
    return load_tile(x, batch, seen, channels, there & (channels < dim))


@triton.jit
def convolve(
    x, weight, bias, numbers, batch, tokens, channels, seqlen, dim, WIDTH: tl.constexpr, REVERSE: tl.constexpr
):
    """Return bias plus the sum over taps, (TOKENS, CHANNELS), in float32."""
    total = tl.zeros((tokens.shape[0], channels.shape[1]), tl.float32)
    for k in tl.static_range(WIDTH):
        tap = tl.load(weight + channels * WIDTH + k, mask=channels < dim, other=0.0).to(tl.float32)
        total += tap * load_tap(x, numbers, batch, tokens, channels, seqlen, dim, k, WIDTH, REVERSE)
    if bias is not None:
        total += tl.load(bias + channels, mask=channels < dim, other=0.0).to(tl.float32)
    return total


@triton.jit
def convolve_backward(
    dout, x, weight, bias, numbers, before, dweight, dbias, batch, tokens, channels, inside, tile, seqlen, dim,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Write the gradient before SiLU, and the tile's share of the gradients of weight and bias."""
    grad = load_tile(dout, batch, tokens, channels, inside)
    if SILU:
        out = convolve(x, weight, bias, numbers, batch, tokens, channels, seqlen, dim, WIDTH, REVERSE)
        passed = tl.sigmoid(out)
        grad *= passed * (1 + out * (1 - passed))
    store_tile(before, batch, tokens, channels, grad, inside)
    for k in tl.static_range(WIDTH):
        seen = load_tap(x, numbers, batch, tokens, channels, seqlen, dim, k, WIDTH, REVERSE)
        share = tl.sum(grad * seen, axis=0)[None, :]
        tl.store(dweight + (tile.to(tl.int64) * WIDTH + k) * dim + channels, share, mask=channels < dim)
    if bias is not None:
        share = tl.sum(grad, axis=0)[None, :]
        tl.store(dbias + tile.to(tl.int64) * dim + channels, share, mask=channels < dim)


@triton.jit
def causal_conv1d_fwd_kernel(
    x, weight, bias, numbers, out, seqlen, dim, WIDTH: tl.constexpr, SILU: tl.constexpr, REVERSE: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the convolution of one direction."""
    batch, tokens, channels, inside = place_tile(seqlen, dim, TOKENS, CHANNELS)
    total = convolve(x, weight, bias, numbers, batch, tokens, channels, seqlen, dim, WIDTH, REVERSE)
    if SILU:
        total *= tl.sigmoid(total)
    store_tile(out, batch, tokens, channels, total, inside)


@triton.jit
def causal_conv1d_bwd_kernel(
    dout, x, weight, bias, numbers, before, dweight, dbias, seqlen, dim, WIDTH: tl.constexpr, SILU: tl.constexpr,
    REVERSE: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Run the first part of the backward pass, `convolve_backward`, on each tile."""
    batch, tokens, channels, inside = place_tile(seqlen, dim, TOKENS, CHANNELS)
    convolve_backward(
        dout, x, weight, bias, numbers, before, dweight, dbias, batch, tokens, channels, inside, tl.program_id(0),
        seqlen, dim, WIDTH, REVERSE, SILU,
    )  # fmt: skip


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """Implement `vim::causal_conv1d_triton`; results are the reference's."""
    return segmented_conv1d(x, weight, bias, None, silu, reverse)


def segmented_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, silu: bool, reverse: bool
) -> Tensor:
    """Implement `vim::segmented_conv1d_triton`; results are the reference's."""
    out = empty_like_layout(x)
    _launch(rows(x), weight.contiguous(), bias, _numbers(seq_idx), rows(out), silu, reverse)
    return out


def causal_conv1d_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Implement `vim::causal_conv1d_backward_triton`; results are the reference's."""
    return segmented_conv1d_backward(dout, x, weight, bias, None, silu, reverse)


def segmented_conv1d_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Implement `vim::segmented_conv1d_backward_triton`; results are the reference's."""
    batch, dim, seqlen = x.shape
    width, weight, dx = weight.shape[1], weight.contiguous(), empty_like_layout(x)
    before = torch.empty(batch, seqlen, dim, device=x.device).mT
    dweight, dbias = partials(x.mT, width)
    numbers = _numbers(seq_idx)
    with on_device(x):
        causal_conv1d_bwd_kernel[tiles(x.mT)](
            rows(dout), rows(x), weight, contiguous(bias), numbers, rows(before), dweight, dbias,
            seqlen, dim, WIDTH=width, SILU=silu, REVERSE=reverse, TOKENS=TOKENS, CHANNELS=CHANNELS,
        )  # fmt: skip
    _launch(rows(before), weight, None, numbers, rows(dx), False, not reverse)
    return dx, dweight.sum(0).T.contiguous(), weight.new_empty(0) if bias is None else dbias.sum(0)


def _numbers(seq_idx: Tensor | None) -> Tensor | None:
    return None if seq_idx is None else number_sequences(seq_idx).int()


def _launch(
    x: Rows, weight: Tensor, bias: Tensor | None, numbers: Tensor | None, out: Rows, silu: bool, reverse: bool
) -> None:
    _, dim, seqlen = x.base.shape
    with on_device(weight):
        causal_conv1d_fwd_kernel[tiles(x.base.mT)](
            x, weight, contiguous(bias), numbers, out, seqlen, dim, WIDTH=weight.shape[1], SILU=silu,
            REVERSE=reverse, TOKENS=TOKENS, CHANNELS=CHANNELS,
        )  # fmt: skip


def tiles(x: Tensor) -> tuple[int, int]:
    """Return the grid of programs for x (batch, len, dim)."""
    batch, seqlen, dim = x.shape
    return batch * triton.cdiv(seqlen, TOKENS), triton.cdiv(dim, CHANNELS)


def partials(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Allocate the shares of the tiles of x (batch, len, dim) in the gradients of weight and bias."""
    shape = (tiles(x)[0], x.shape[2])
    return torch.empty(shape[0], width, shape[1], device=x.device), torch.empty(shape, device=x.device)
