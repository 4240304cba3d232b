"""`vim::selective_scan` and its backward, as torch knows them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vim.ops.common.layout import CHECKPOINT_EVERY, accumulate_dtype, empty_like_layout, num_chunks
from vim.ops.common.registration import define_autograd, define_op
from vim.ops.selective_scan import reference

_INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias"
_SETTINGS = "bool delta_softplus, bool reverse, int checkpoint_every"


def scan_flops(batch: int, dim: int, seqlen: int, d_state: int) -> int:
    """9 operations per token, channel and state: the field's count for one scan."""
    return 9 * batch * dim * seqlen * d_state


def _fake(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    checkpoint_every: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, dim, seqlen = u.shape
    d_state = A.shape[1]
    checkpoints = A.new_empty(batch, num_chunks(seqlen, checkpoint_every), d_state, dim)
    return empty_like_layout(u), A.new_empty(batch, dim, d_state), checkpoints


def _backward_fake(
    dout: Tensor,
    dlast_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    checkpoints: Tensor,
    delta_softplus: bool,
    reverse: bool,
    checkpoint_every: int,
) -> tuple[Tensor, ...]:
    absent = u.new_empty(0, dtype=accumulate_dtype(u.dtype))
    return (
        empty_like_layout(u),
        empty_like_layout(delta),
        A.new_empty(A.shape),
        B.new_empty(B.shape),
        C.new_empty(C.shape),
        absent if D is None else D.new_empty(D.shape),
        u.new_empty(0) if z is None else empty_like_layout(z),
        absent.clone() if delta_bias is None else delta_bias.new_empty(delta_bias.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.delta_softplus, ctx.reverse, ctx.checkpoint_every = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(
    backward_op: Any, forward_op: Any, ctx: Any, dout: Tensor | None, dlast_state: Tensor | None, _: Any
) -> Any:
    *tensors, checkpoints = ctx.saved_tensors
    u, _delta, _A, _B, _C, D, z, delta_bias = tensors
    every = ctx.checkpoint_every
    if dout is None and dlast_state is None:
        return (None,) * 11
    if every == 0:
        every = CHECKPOINT_EVERY
        checkpoints = forward_op(*tensors, ctx.delta_softplus, ctx.reverse, every)[2]
    dout = torch.zeros_like(u) if dout is None else dout
    grads = backward_op(dout, dlast_state, *tensors, checkpoints, ctx.delta_softplus, ctx.reverse, every)
    present = (True,) * 5 + (D is not None, z is not None, delta_bias is not None)
    return *(g if there else None for g, there in zip(grads, present, strict=True)), None, None, None


def _flops(u: Any, delta: Any, A: Any, *others: Any, **settings: Any) -> int:
    batch, dim, seqlen = u
    return scan_flops(batch, dim, seqlen, A[1])


def _backward_flops(dout: Any, dlast_state: Any, u: Any, delta: Any, A: Any, *others: Any, **settings: Any) -> int:
    # The states are rebuilt, and each product of the forward has two factors to differentiate.
    return 3 * _flops(u, delta, A)


define_op(
    "selective_scan",
    schema=f"({_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    reference=reference.selective_scan,
    fake=_fake,
    flops=_flops,
)
define_op(
    "selective_scan_backward",
    schema=f"(Tensor dout, Tensor? dlast_state, {_INPUTS}, Tensor checkpoints, {_SETTINGS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.selective_scan_backward,
    fake=_backward_fake,
    flops=_backward_flops,
)
define_autograd(
    "selective_scan",
    reference=reference.selective_scan,
    save=_save,
    backward=_backward,
    cotangents=2,
    again=lambda *arguments: reference.selective_scan(*arguments[:8], *arguments[9:]),  # without entry states
)
