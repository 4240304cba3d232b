"""The convolutions of both directions in plain PyTorch: the specification of every other backend.

    out[l]   = silu(bias   + sum_k weight[k]   x[l - (width - 1) + k])         the tokens up to l
    out_b[l] = silu(bias_b + sum_k weight_b[k] x[l + (width - 1) - k])         the tokens from l on

Channel-last, (batch, len, dim). Arithmetic is float32, or float64 for float64 input.
"""

from __future__ import annotations

from torch import Tensor

from vim.ops.causal_conv1d.reference import causal_conv1d, causal_conv1d_backward


def bidirectional_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, weight_b: Tensor, bias_b: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return out and out_b, (batch, len, dim) each."""
    out = causal_conv1d(x.mT, weight, bias, silu=True, reverse=False)
    out_b = causal_conv1d(x.mT, weight_b, bias_b, silu=True, reverse=True)
    return out.mT.contiguous(), out_b.mT.contiguous()


def bidirectional_conv1d_backward(
    dout: Tensor,
    dout_b: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_b: Tensor,
    bias_b: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dweight, dbias, dweight_b, dbias_b (a bias' gradient is empty without that bias)."""
    acc = weight.dtype
    wide = x.mT.to(acc)
    dx, dweight, dbias = causal_conv1d_backward(dout.mT.to(acc), wide, weight, bias, True, False)
    dx_b, dweight_b, dbias_b = causal_conv1d_backward(dout_b.mT.to(acc), wide, weight_b, bias_b, True, True)
    return (dx + dx_b).mT.to(x.dtype).contiguous(), dweight, dbias, dweight_b, dbias_b
