"""Registration of `vim::causal_conv1d`, `vim::segmented_conv1d` and their backward passes with torch."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from vim.ops.causal_conv1d import reference
from vim.ops.common.layout import accumulate_dtype, empty_like_layout
from vim.ops.common.registration import define_autograd, define_op

_TENSORS = "Tensor x, Tensor weight, Tensor? bias"
_SETTINGS = "bool silu, bool reverse"


def _fake(x: Tensor, *others: Any) -> Tensor:
    return empty_like_layout(x)


def _backward_fake(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = x.new_empty(0, dtype=accumulate_dtype(x.dtype)) if bias is None else bias.new_empty(bias.shape)
    return empty_like_layout(x), weight.new_empty(weight.shape), dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _backward(backward_op: Any, forward_op: Any, ctx: Any, dout: Tensor) -> Any:
    x, weight, bias, *seq_idx = ctx.saved_tensors
    dx, dweight, dbias = backward_op(dout, x, weight, bias, *seq_idx, ctx.silu, ctx.reverse)
    return dx, dweight, None if bias is None else dbias, *(None for _ in seq_idx), None, None


def _flops(x: Any, weight: Any, *others: Any, **settings: Any) -> int:
    return 2 * math.prod(x) * weight[1]


def _backward_flops(dout: Any, x: Any, weight: Any, *others: Any, **settings: Any) -> int:
    return 2 * _flops(x, weight)


define_op(
    "causal_conv1d",
    schema=f"({_TENSORS}, {_SETTINGS}) -> Tensor",
    reference=reference.causal_conv1d,
    fake=_fake,
    flops=_flops,
)
define_op(
    "causal_conv1d_backward",
    schema=f"(Tensor dout, {_TENSORS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    reference=reference.causal_conv1d_backward,
    fake=_backward_fake,
    flops=_backward_flops,
)
define_autograd("causal_conv1d", reference=reference.causal_conv1d, save=_save, backward=_backward)

define_op(
    "segmented_conv1d",
    schema=f"({_TENSORS}, Tensor seq_idx, {_SETTINGS}) -> Tensor",
    reference=reference.segmented_conv1d,
    fake=_fake,
    flops=_flops,
)
define_op(
    "segmented_conv1d_backward",
    schema=f"(Tensor dout, {_TENSORS}, Tensor seq_idx, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    reference=reference.segmented_conv1d_backward,
    fake=_backward_fake,
    flops=_backward_flops,
)
define_autograd("segmented_conv1d", reference=reference.segmented_conv1d, save=_save, backward=_backward)
