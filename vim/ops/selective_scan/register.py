"""Registration of `vim::selective_scan`, `vim::segmented_scan` and their backward passes with torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vim.ops.common.layout import CHECKPOINT_EVERY, accumulate_dtype, empty_like_layout, num_chunks
from vim.ops.common.registration import define_autograd, define_op
from vim.ops.selective_scan import chunked
from vim.ops.selective_scan.inputs import PLAIN_TENSORS, ScanInputs, segmented, split_backward

_INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias"
_SEGMENTS = "Tensor? initial_state, Tensor? seq_idx"
_SETTINGS = "bool delta_softplus, bool reverse, int checkpoint_every"


def scan_flops(batch: int, dim: int, seqlen: int, d_state: int) -> int:
    """Return 9 operations per token, channel and state: the count that the field uses for one scan."""
    return 9 * batch * dim * seqlen * d_state


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _segmented_fake(*segmented(arguments))


def _segmented_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = ScanInputs(*arguments)
    batch, dim, seqlen = inputs.u.shape
    A, d_state = inputs.A, inputs.A.shape[1]
    checkpoints = A.new_empty(batch, num_chunks(seqlen, inputs.checkpoint_every), d_state, dim)
    return empty_like_layout(inputs.u), A.new_empty(batch, dim, d_state), checkpoints


def _backward_fake(dout: Tensor, dlast_state: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    return _segmented_backward_fake(dout, dlast_state, *segmented(arguments))[:PLAIN_TENSORS]


def _segmented_backward_fake(dout: Tensor, dlast_state: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    u, delta, A, B, C, D, z, delta_bias, initial_state, *_ = split_backward(arguments)[0]
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
        A.new_empty(0) if initial_state is None else A.new_empty(initial_state.shape),
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
    inputs, every = len(tensors) + 3, ctx.checkpoint_every
    if dout is None and dlast_state is None:
        return (None,) * inputs
    if every == 0:
        every = CHECKPOINT_EVERY
        checkpoints = forward_op(*tensors, ctx.delta_softplus, ctx.reverse, every)[2]
    dout = torch.zeros_like(tensors[0]) if dout is None else dout
    grads = backward_op(dout, dlast_state, *tensors, checkpoints, ctx.delta_softplus, ctx.reverse, every)
    given = [None if t is None else g for g, t in zip(grads, tensors[: len(grads)], strict=True)]
    return *given, *(None,) * (inputs - len(given))


def _flops(u: Any, delta: Any, A: Any, *others: Any, **settings: Any) -> int:
    batch, dim, seqlen = u
    return scan_flops(batch, dim, seqlen, A[1])


def _backward_flops(dout: Any, dlast_state: Any, u: Any, delta: Any, A: Any, *others: Any, **settings: Any) -> int:
    # The backward pass rebuilds the states, and each product of the forward has two factors to differentiate.
    return 3 * _flops(u, delta, A)


define_op(
    "selective_scan",
    schema=f"({_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    reference=chunked.selective_scan,
    fake=_fake,
    flops=_flops,
)
define_op(
    "selective_scan_backward",
    schema=f"(Tensor dout, Tensor? dlast_state, {_INPUTS}, Tensor checkpoints, {_SETTINGS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=chunked.selective_scan_backward,
    fake=_backward_fake,
    flops=_backward_flops,
)
define_autograd(
    "selective_scan",
    reference=chunked.selective_scan,
    save=_save,
    backward=_backward,
    cotangents=2,
    again=lambda *arguments: chunked.segmented_scan(*split_backward(segmented(arguments))[0]),
)

# The same with an initial state and sequence indices, as an op of its own: programs that were exported with the plain
# op stay valid, and a backend may have the plain one alone.
define_op(
    "segmented_scan",
    schema=f"({_INPUTS}, {_SEGMENTS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    reference=chunked.segmented_scan,
    fake=_segmented_fake,
    flops=_flops,
)
define_op(
    "segmented_scan_backward",
    schema=f"(Tensor dout, Tensor? dlast_state, {_INPUTS}, {_SEGMENTS}, Tensor checkpoints, {_SETTINGS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=chunked.segmented_scan_backward,
    fake=_segmented_backward_fake,
    flops=_backward_flops,
)
define_autograd(
    "segmented_scan",
    reference=chunked.segmented_scan,
    save=_save,
    backward=_backward,
    cotangents=2,
    again=lambda *arguments: chunked.segmented_scan(*split_backward(arguments)[0]),
)
