"""Registration of `vim::bidirectional_conv1d` and its backward with torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vim.ops.bidirectional_conv1d import reference
from vim.ops.common.layout import accumulate_dtype
from vim.ops.common.registration import define_autograd, define_op

_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor weight_b, Tensor? bias_b"


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, weight_b: Tensor, bias_b: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _backward_fake(
    dout: Tensor,
    dout_b: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_b: Tensor,
    bias_b: Tensor | None,
) -> tuple[Tensor, ...]:
    def dbias(b: Tensor | None) -> Tensor:
        return x.new_empty(0, dtype=accumulate_dtype(x.dtype)) if b is None else b.new_empty(b.shape)

    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        dbias(bias),
        weight_b.new_empty(weight_b.shape),
        dbias(bias_b),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _backward(backward_op: Any, forward_op: Any, ctx: Any, dout: Tensor | None, dout_b: Tensor | None) -> Any:
    x, weight, bias, weight_b, bias_b = ctx.saved_tensors
    if dout is None and dout_b is None:
        return (None,) * 5
    dout = torch.zeros_like(x) if dout is None else dout
    dout_b = torch.zeros_like(x) if dout_b is None else dout_b
    dx, dweight, dbias, dweight_b, dbias_b = backward_op(dout, dout_b, x, weight, bias, weight_b, bias_b)
    return dx, dweight, None if bias is None else dbias, dweight_b, None if bias_b is None else dbias_b


def _flops(x: Any, weight: Any, bias: Any, weight_b: Any, *others: Any, **settings: Any) -> int:
    return 2 * math.prod(x) * (weight[1] + weight_b[1])


def _backward_flops(dout: Any, dout_b: Any, x: Any, weight: Any, bias: Any, weight_b: Any, *others: Any) -> int:
    return 2 * _flops(x, weight, bias, weight_b)


define_op(
    "bidirectional_conv1d",
    schema=f"({_INPUTS}) -> (Tensor, Tensor)",
    reference=reference.bidirectional_conv1d,
    fake=_fake,
    flops=_flops,
)
define_op(
    "bidirectional_conv1d_backward",
    schema=f"(Tensor dout, Tensor dout_b, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.bidirectional_conv1d_backward,
    fake=_backward_fake,
    flops=_backward_flops,
)
define_autograd(
    "bidirectional_conv1d", reference=reference.bidirectional_conv1d, save=_save, backward=_backward, cotangents=2
)
