"""Depthwise causal convolution in plain PyTorch: the specification of every other backend.

    out[l] = silu(bias + sum_k weight[k] x[l - (width - 1) + k])

with zeros before the first token. `reverse` mirrors it: out[l] sees x[l] and the tokens after it. The last tap of
`weight` always multiplies x[l]. Where `seq_idx` changes from one token to the next, a sequence ends and the next one
starts: each sees zeros in place of the other. Arithmetic is float32, or float64 for float64 input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vim.ops.common.layout import accumulate_dtype, like_layout
from vim.ops.common.segments import number_sequences


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """Return out, (batch, dim, len)."""
    return segmented_conv1d(x, weight, bias, None, silu, reverse)


def segmented_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, silu: bool, reverse: bool
) -> Tensor:
    """Return out, (batch, dim, len)."""
    out = convolve(x.to(accumulate_dtype(x.dtype)), weight, reverse, seq_idx)
    if bias is not None:
        out = out + bias[:, None]
    return like_layout(F.silu(out) if silu else out, x)


def causal_conv1d_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dweight and dbias (empty without a bias)."""
    return segmented_conv1d_backward(dout, x, weight, bias, None, silu, reverse)


def segmented_conv1d_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dweight and dbias (empty without a bias)."""
    acc = accumulate_dtype(x.dtype)
    grad = dout.to(acc)
    if silu:
        before = convolve(x.to(acc), weight, reverse, seq_idx) + (0 if bias is None else bias[:, None])
        gate = torch.sigmoid(before)
        grad = grad * gate * (1 + before * (1 - gate))
    # The gradient of a causal convolution is the same convolution in the other direction.
    dx = like_layout(convolve(grad, weight, not reverse, seq_idx), x)
    inputs = taps(x.to(acc), weight.shape[1], reverse, seq_idx)
    dweight = torch.stack([(grad * tap).sum((0, 2)) for tap in inputs], dim=1)
    return dx, dweight, x.new_empty(0, dtype=acc) if bias is None else grad.sum((0, 2))


def convolve(x: Tensor, weight: Tensor, reverse: bool, seq_idx: Tensor | None = None) -> Tensor:
    """Return the sum over taps, (batch, dim, len)."""
    out = torch.zeros_like(x)
    for k, tap in enumerate(taps(x, weight.shape[1], reverse, seq_idx)):
        out = out + weight[:, k, None] * tap
    return out


def taps(x: Tensor, width: int, reverse: bool, seq_idx: Tensor | None = None) -> list[Tensor]:
    """Return the input of each tap of the filter: `x` shifted, with zeros moving in, (batch, dim, len) each."""
    shifted = _shifts(x, width, reverse)
    if seq_idx is None:
        return shifted
    numbers = number_sequences(seq_idx)[:, None]
    others = [theirs != numbers for theirs in _shifts(numbers, width, reverse)]
    return [tap.masked_fill(other, 0) for tap, other in zip(shifted, others, strict=True)]


def _shifts(x: Tensor, width: int, reverse: bool) -> list[Tensor]:
    seqlen = x.shape[-1]
    padded = F.pad(x, (0, width - 1) if reverse else (width - 1, 0))
    starts = range(width - 1, -1, -1) if reverse else range(width)
    return [padded[..., start : start + seqlen] for start in starts]
