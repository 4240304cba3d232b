"""Registration of `vim::bidirectional_block` and its backward with torch."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from vim.ops.bidirectional_block import reference
from vim.ops.bidirectional_block.reference import PRODUCTS, WEIGHTS
from vim.ops.common.layout import CHECKPOINT_EVERY, accumulate_dtype, num_chunks
from vim.ops.common.registration import define_autograd, define_op
from vim.ops.selective_scan.register import scan_flops

_DIRECTION = (
    "Tensor conv_weight{0}, Tensor? conv_bias{0}, Tensor x_proj{0}, Tensor dt_weight{0}, Tensor dt_bias{0}, "
    "Tensor {1}, Tensor D{0}"
)
_WEIGHTS = (
    f"Tensor norm_weight, Tensor in_proj, Tensor? in_bias, {_DIRECTION.format('', 'A_log')}, "
    f"{_DIRECTION.format('_b', 'A_b_log')}, Tensor out_proj, Tensor? out_bias"
)
_A_LOG, _DT_WEIGHT, _CONV_WEIGHT, _IN_PROJ, _X_PROJ = 8, 6, 3, 1, 5


def _fake(hidden_states: Tensor, residual: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    weights, (dtype, _, _, checkpoint_every) = arguments[:WEIGHTS], arguments[WEIGHTS:]
    batch, seqlen, _ = hidden_states.shape
    acc = accumulate_dtype(dtype)
    out = hidden_states.new_empty(hidden_states.shape, dtype=dtype)
    total = hidden_states.new_empty(hidden_states.shape, dtype=acc)
    if checkpoint_every == 0:
        return out, total, out.new_empty(0), out.new_empty(0), total.new_empty(0)
    d_inner, d_state = weights[_A_LOG].shape
    columns = weights[_X_PROJ].shape[0]
    # On a GPU each row starts at a multiple of 16 bytes.
    padded = -(-columns // 8) * 8 if hidden_states.is_cuda else columns
    states = (2, batch, num_chunks(seqlen, checkpoint_every), d_state, d_inner)
    return (
        out,
        total,
        out.new_empty(batch, seqlen, 2 * d_inner),
        out.new_empty(2, batch, seqlen, padded)[..., :columns],
        total.new_empty(states),
    )


def _backward_fake(dout: Tensor, dresidual: Tensor | None, residual: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    weights, weight_grads = arguments[:WEIGHTS], arguments[-1]

    def gradient(i: int, weight: Tensor | None) -> Tensor:
        if weight is None:
            return dout.new_empty(0, dtype=accumulate_dtype(dout.dtype))
        return weight.new_empty(0) if i in PRODUCTS and not weight_grads else weight.new_empty(weight.shape)

    return residual.new_empty(residual.shape), *(gradient(i, w) for i, w in enumerate(weights))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_states, residual, *weights = inputs[: 2 + WEIGHTS]
    ctx.dtype, ctx.eps, ctx.scale, ctx.checkpoint_every = inputs[2 + WEIGHTS :]
    ctx.hidden_dtype, ctx.has_residual = hidden_states.dtype, residual is not None
    # An exported program saves no states; its backward pass runs the forward pass again.
    first = output[1:] if ctx.checkpoint_every else (hidden_states, residual)
    ctx.saved = len(first)
    ctx.save_for_backward(*first, *weights)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _backward(
    backward_op: Any, forward_op: Any, ctx: Any, dout: Tensor | None, dresidual: Tensor | None, *_: Any
) -> Any:
    if dout is None:  # nobody used the mixer's output: the residual sum alone has a gradient, and no weight took part
        of_hidden = None if dresidual is None else dresidual.to(ctx.hidden_dtype)
        return of_hidden, dresidual if ctx.has_residual else None, *(None,) * (4 + WEIGHTS)
    saved_tensors = ctx.saved_tensors  # once: activation checkpointing unpacks no tensor twice
    first, weights = saved_tensors[: ctx.saved], saved_tensors[ctx.saved :]
    every = ctx.checkpoint_every
    if every == 0:
        every = CHECKPOINT_EVERY
        first = forward_op(*first, *weights, ctx.dtype, ctx.eps, ctx.scale, every)[1:]
    total, *saved = first
    needed = ctx.needs_input_grad[2 : 2 + WEIGHTS]
    weight_grads = any(needed[i] for i in PRODUCTS)
    settings = (ctx.eps, ctx.scale, every, weight_grads)
    dsum, *grads = backward_op(dout, dresidual, total, *weights, *saved, *settings)
    of_weights = [g if need and w is not None else None for g, need, w in zip(grads, needed, weights, strict=True)]
    return dsum.to(ctx.hidden_dtype), dsum if ctx.has_residual else None, *of_weights, None, None, None, None


def _flops(hidden_states: Any, residual: Any, *arguments: Any, **settings: Any) -> int:
    batch, seqlen, d_model = hidden_states
    weights = arguments[:WEIGHTS]
    (d_inner, d_state), dt_rank = weights[_A_LOG], weights[_DT_WEIGHT][1]
    products = 3 * d_model * d_inner + 2 * d_inner * weights[_X_PROJ][0]
    convolutions = 2 * d_inner * weights[_CONV_WEIGHT][-1]
    scans = 2 * (2 * batch * seqlen * d_inner * dt_rank + scan_flops(batch, d_inner, seqlen, d_state))
    return 2 * batch * seqlen * (products + convolutions) + scans + 5 * math.prod(hidden_states)


def _backward_flops(dout: Any, dresidual: Any, residual: Any, *arguments: Any, **settings: Any) -> int:
    # The convolutions run again. A product has two gradients, and a scan's backward pass counts three times.
    return 2 * _flops(residual, None, *arguments)


def _again(residual: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    weights, (xz, _, _, eps, scale, _, _) = arguments[:WEIGHTS], arguments[WEIGHTS:]
    out, total, *_ = reference.bidirectional_block(residual, None, *weights, xz.dtype, eps, scale, 0)
    return out, total


define_op(
    "bidirectional_block",
    schema=(
        f"(Tensor hidden_states, Tensor? residual, {_WEIGHTS}, ScalarType dtype, float eps, float scale, "
        "int checkpoint_every) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    reference=reference.bidirectional_block,
    fake=_fake,
    flops=_flops,
)
define_op(
    "bidirectional_block_backward",
    schema=(
        f"(Tensor dout, Tensor? dresidual, Tensor residual, {_WEIGHTS}, Tensor xz, Tensor x_dbl, Tensor checkpoints, "
        f"float eps, float scale, int checkpoint_every, bool weight_grads) -> ({', '.join(['Tensor'] * 20)})"
    ),
    reference=reference.bidirectional_block_backward,
    fake=_backward_fake,
    flops=_backward_flops,
)
define_autograd(
    "bidirectional_block",
    reference=reference.bidirectional_block,
    save=_save,
    backward=_backward,
    cotangents=2,
    again=_again,
)
