"""Registration of `vim::add_rms_norm` and its backward with torch."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from vim.ops.add_rms_norm import reference
from vim.ops.common.layout import accumulate_dtype
from vim.ops.common.registration import define_autograd, define_op


def _fake(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=accumulate_dtype(x.dtype))


def _backward_fake(
    dy: Tensor | None, dr: Tensor | None, r: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return r.new_empty(r.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, ctx.eps = inputs
    ctx.x_dtype, ctx.has_residual = x.dtype, residual is not None
    ctx.save_for_backward(output[1], weight)
    ctx.set_materialize_grads(False)


def _backward(backward_op: Any, forward_op: Any, ctx: Any, dy: Tensor | None, dr: Tensor | None) -> Any:
    r, weight = ctx.saved_tensors
    if dy is None and dr is None:
        return (None,) * 4
    total, dweight = backward_op(dy, dr, r, weight, ctx.eps)
    return total.to(ctx.x_dtype), total if ctx.has_residual else None, dweight, None


def _flops(x: Any, *others: Any, **settings: Any) -> int:
    return 5 * math.prod(x)


def _backward_flops(dy: Any, dr: Any, r: Any, *others: Any, **settings: Any) -> int:
    return 10 * math.prod(r)


define_op(
    "add_rms_norm",
    schema="(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    reference=reference.add_rms_norm,
    fake=_fake,
    flops=_flops,
)
define_op(
    "add_rms_norm_backward",
    schema="(Tensor? dy, Tensor? dr, Tensor r, Tensor weight, float eps) -> (Tensor, Tensor)",
    reference=reference.add_rms_norm_backward,
    fake=_backward_fake,
    flops=_backward_flops,
)
define_autograd(
    "add_rms_norm",
    reference=reference.add_rms_norm,
    save=_save,
    backward=_backward,
    cotangents=2,
    again=lambda r, weight, eps: reference.add_rms_norm(r, None, weight, eps),
)
