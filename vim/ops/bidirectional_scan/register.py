"""Registration of `vim::bidirectional_scan` and its backward with torch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vim.ops.bidirectional_scan import reference
from vim.ops.common.layout import CHECKPOINT_EVERY, num_chunks
from vim.ops.common.registration import define_autograd, define_op
from vim.ops.selective_scan.register import scan_flops

_OPERANDS = (
    "Tensor u, Tensor x_dbl, Tensor dt_weight, Tensor dt_bias, Tensor A_log, Tensor D, "
    "Tensor u_b, Tensor x_dbl_b, Tensor dt_weight_b, Tensor dt_bias_b, Tensor A_b_log, Tensor D_b, Tensor z"
)
_SETTINGS = "float scale, int checkpoint_every"


def _fake(u: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    A_log, checkpoint_every = others[3], others[-1]
    batch, seqlen, dim = u.shape
    checkpoints = A_log.new_empty(2, batch, num_chunks(seqlen, checkpoint_every), A_log.shape[1], dim)
    return u.new_empty(u.shape), checkpoints


def _backward_fake(dy: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in others[:13])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.checkpoint_every = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(backward_op: Any, forward_op: Any, ctx: Any, dy: Tensor | None, _: Any) -> Any:
    if dy is None:
        return (None,) * 15
    *tensors, checkpoints = ctx.saved_tensors
    every = ctx.checkpoint_every
    if every == 0:
        every = CHECKPOINT_EVERY
        checkpoints = forward_op(*tensors, ctx.scale, every)[1]
    return *backward_op(dy, *tensors, checkpoints, ctx.scale, every), None, None


def _flops(u: Any, x_dbl: Any, dt_weight: Any, dt_bias: Any, A_log: Any, *others: Any, **settings: Any) -> int:
    batch, seqlen, dim = u
    projection = 2 * batch * seqlen * dim * dt_weight[1]
    return 2 * (projection + scan_flops(batch, dim, seqlen, A_log[1]))


def _backward_flops(dy: Any, u: Any, x_dbl: Any, dt_weight: Any, dt_bias: Any, A_log: Any, *others: Any) -> int:
    return 3 * _flops(u, x_dbl, dt_weight, dt_bias, A_log)


define_op(
    "bidirectional_scan",
    schema=f"({_OPERANDS}, {_SETTINGS}) -> (Tensor, Tensor)",
    reference=reference.bidirectional_scan,
    fake=_fake,
    flops=_flops,
)
define_op(
    "bidirectional_scan_backward",
    schema=f"(Tensor dy, {_OPERANDS}, Tensor checkpoints, {_SETTINGS}) -> ({', '.join(['Tensor'] * 13)})",
    reference=reference.bidirectional_scan_backward,
    fake=_backward_fake,
    flops=_backward_flops,
)
define_autograd(
    "bidirectional_scan",
    reference=reference.bidirectional_scan,
    save=_save,
    backward=_backward,
    again=lambda *arguments: reference.bidirectional_scan(*arguments[:13], *arguments[14:]),  # without entry states
)
