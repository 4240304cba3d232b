"""The convolutions of both directions in Triton, from one read of x, built on `causal_conv1d/triton.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vim.ops.causal_conv1d.triton import (
    CHANNELS,
    TOKENS,
    convolve,
    convolve_backward,
    partials,
    tiles,
)
from vim.ops.common.triton_tensors import contiguous, on_device, place_tile, rows, store_tile


@triton.jit
def bidirectional_conv1d_fwd_kernel(
    x, weight, bias, weight_b, bias_b, out, out_b, seqlen, dim, WIDTH: tl.constexpr, WIDTH_B: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write both convolutions with SiLU."""
    batch, tokens, channels, inside = place_tile(seqlen, dim, TOKENS, CHANNELS)
    total = convolve(x, weight, bias, None, batch, tokens, channels, seqlen, dim, WIDTH, False)
    total_b = convolve(x, weight_b, bias_b, None, batch, tokens, channels, seqlen, dim, WIDTH_B, True)
    store_tile(out, batch, tokens, channels, total * tl.sigmoid(total), inside)
    store_tile(out_b, batch, tokens, channels, total_b * tl.sigmoid(total_b), inside)


@triton.jit
def bidirectional_conv1d_bwd_kernel(
    dout, dout_b, x, weight, bias, weight_b, bias_b, before, before_b, dweight, dbias, dweight_b, dbias_b, seqlen, dim,
    WIDTH: tl.constexpr, WIDTH_B: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the gradients before SiLU, and each tile's share of the weights' gradients."""
    batch, tokens, channels, inside = place_tile(seqlen, dim, TOKENS, CHANNELS)
    tile = tl.program_id(0)
    convolve_backward(
        dout, x, weight, bias, None, before, dweight, dbias, batch, tokens, channels, inside, tile, seqlen, dim,
        WIDTH, False, True,
    )  # fmt: skip
    convolve_backward(
        dout_b, x, weight_b, bias_b, None, before_b, dweight_b, dbias_b, batch, tokens, channels, inside, tile,
        seqlen, dim, WIDTH_B, True, True,
    )  # fmt: skip


@triton.jit
def bidirectional_conv1d_dx_kernel(
    before, before_b, weight, weight_b, dx, seqlen, dim, WIDTH: tl.constexpr, WIDTH_B: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x: both gradients before SiLU, convolved in the other direction."""
    batch, tokens, channels, inside = place_tile(seqlen, dim, TOKENS, CHANNELS)
    total = convolve(before, weight, None, None, batch, tokens, channels, seqlen, dim, WIDTH, True)
    total += convolve(before_b, weight_b, None, None, batch, tokens, channels, seqlen, dim, WIDTH_B, False)
    store_tile(dx, batch, tokens, channels, total, inside)


def bidirectional_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, weight_b: Tensor, bias_b: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Implement `vim::bidirectional_conv1d_triton`; results are the reference's."""
    out, out_b = x.new_empty(x.shape), x.new_empty(x.shape)
    with on_device(x):
        bidirectional_conv1d_fwd_kernel[tiles(x)](
            rows(x.mT), weight.contiguous(), contiguous(bias), weight_b.contiguous(), contiguous(bias_b),
            rows(out.mT), rows(out_b.mT), x.shape[1], x.shape[2],
            WIDTH=weight.shape[1], WIDTH_B=weight_b.shape[1], TOKENS=TOKENS, CHANNELS=CHANNELS,
        )  # fmt: skip
    return out, out_b


def bidirectional_conv1d_backward(
    dout: Tensor,
    dout_b: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_b: Tensor,
    bias_b: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Implement `vim::bidirectional_conv1d_backward_triton`; results are the reference's."""
    _, seqlen, dim = x.shape
    dx, before, before_b = x.new_empty(x.shape), *torch.empty(2, *x.shape, device=x.device)
    settings = {"WIDTH": weight.shape[1], "WIDTH_B": weight_b.shape[1], "TOKENS": TOKENS, "CHANNELS": CHANNELS}
    (dweight, dbias), (dweight_b, dbias_b) = partials(x, weight.shape[1]), partials(x, weight_b.shape[1])
    weight, weight_b = weight.contiguous(), weight_b.contiguous()
    with on_device(x):
        bidirectional_conv1d_bwd_kernel[tiles(x)](
            rows(dout.mT), rows(dout_b.mT), rows(x.mT), weight, contiguous(bias), weight_b, contiguous(bias_b),
            rows(before.mT), rows(before_b.mT), dweight, dbias, dweight_b, dbias_b, seqlen, dim, **settings,
        )  # fmt: skip
        bidirectional_conv1d_dx_kernel[tiles(x)](
            rows(before.mT), rows(before_b.mT), weight, weight_b, rows(dx.mT), seqlen, dim, **settings
        )
    absent = weight.new_empty(0)
    return (
        dx,
        dweight.sum(0).T.contiguous(),
        absent if bias is None else dbias.sum(0),
        dweight_b.sum(0).T.contiguous(),
        absent.clone() if bias_b is None else dbias_b.sum(0),
    )
