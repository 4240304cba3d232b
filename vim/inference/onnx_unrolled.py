"""The recurrence as plain ONNX operators, for runtimes without Scan and Loop.

The sequence is cut into about sqrt(len) chunks of about sqrt(len) tokens. All chunks advance side by side, token by
token, from a state of zero. Their last states, carried from chunk to chunk, give the state at the entry of each. Then
the chunks advance again, each from its entry. A scan takes about 20 sqrt(len) nodes.
Every factor is exp(step A) of one token or one chunk, at most 1, so that nothing overflows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from onnxscript import opset18

from vim.ops.backends.exportable import RECURRENCE

# Its annotations are of values; a traced function passes nodes.
op: Any = opset18


def unrolled(
    u: Any, step: Any, A: Any, B: Any, C: Any, initial_state: Any = None, restarts: Any = None
) -> tuple[Any, Any]:
    """Translate `vim::recurrence` (see `vim.ops.backends.exportable`) into operators other than Scan and Loop.

    Args:
        u, step: (len, batch, dim).
        A: (dim, d_state).
        B, C: (len, batch or 1, dim or 1, d_state).
        initial_state: (batch, dim, d_state); `None` is zero.
        restarts: Must be `None`.

    Returns:
        The outputs, (len, batch, dim), and the last state, (batch, dim, d_state).

    Raises:
        ValueError: The number of tokens is not fixed, or several sequences lie in a row.
    """
    if restarts is not None:
        raise ValueError("a graph without Scan takes one sequence at a time: leave seq_idx out")
    length, dim = u.shape[0], u.shape[2]
    if not isinstance(length, int):
        raise ValueError(f"a graph without Scan needs images of one size, got {length} tokens: fix the resolution")
    tokens = math.isqrt(length - 1) + 1
    chunks = -(-length // tokens)

    def cut(t: Any, *rest: int) -> Any:
        """Return (len, batch, *rest) as (batch, chunks, tokens, *rest); tokens of zero at the end keep the state."""
        padding = [0] * (2 + len(rest)) + [chunks * tokens - length] + [0] * (1 + len(rest))
        full = op.Pad(t, op.Constant(value_ints=padding)) if any(padding) else t
        split = op.Reshape(full, op.Constant(value_ints=[chunks, tokens, -1, *rest]))
        return op.Transpose(split, perm=[2, 0, 1, *range(3, 3 + len(rest))])

    def each(t: Any, axis: int, count: int, keep: bool) -> list[Any]:
        index = [op.Constant(value_ints=[i]) if keep else op.Constant(value_int=i) for i in range(count)]
        return [op.Gather(t, i, axis=axis) for i in index]

    # (batch, chunks, d_state, dim): with dim last, the innermost loops of every operator are long.
    decay = op.Transpose(A, perm=[1, 0])
    steps = cut(step, dim)
    factors = [op.Exp(op.Mul(s, decay)) for s in each(steps, 2, tokens, keep=True)]
    drives = each(cut(op.Mul(u, step), dim), 2, tokens, keep=True)
    Bs = each(op.Transpose(cut(B, *B.shape[2:]), perm=[0, 1, 2, 4, 3]), 2, tokens, keep=False)
    inputs = [op.Mul(drive, b) for drive, b in zip(drives, Bs, strict=True)]

    state = inputs[0]
    for factor, addend in zip(factors[1:], inputs[1:], strict=True):
        state = op.Add(op.Mul(factor, state), addend)
    total = op.ReduceSum(steps, op.Constant(value_ints=[2]), keepdims=1)
    over_chunk = each(op.Exp(op.Mul(total, decay)), 1, chunks, keep=True)
    ends = each(state, 1, chunks, keep=True)
    if initial_state is None:
        entries = [op.ConstantOfShape(op.Shape(ends[0]))]
    else:
        entries = [op.Unsqueeze(op.Transpose(initial_state, perm=[0, 2, 1]), op.Constant(value_ints=[1]))]
    for factor, addend in zip(over_chunk, ends, strict=True):
        entries.append(op.Add(op.Mul(factor, entries[-1]), addend))

    state = op.Concat(*entries[:-1], axis=1)
    outputs = []
    for factor, addend, c in zip(factors, inputs, each(cut(C, *C.shape[2:]), 2, tokens, keep=False), strict=True):
        state = op.Add(op.Mul(factor, state), addend)
        if C.shape[2] == 1:
            outputs.append(op.MatMul(c, state))
        else:
            weighed = op.Mul(op.Transpose(c, perm=[0, 1, 3, 2]), state)
            outputs.append(op.ReduceSum(weighed, op.Constant(value_ints=[2]), keepdims=1))
    y = op.Transpose(op.Concat(*outputs, axis=2), perm=[1, 2, 0, 3])
    y = op.Reshape(y, op.Constant(value_ints=[chunks * tokens, -1, dim]))
    y = op.Slice(y, op.Constant(value_ints=[0]), op.Constant(value_ints=[length]), op.Constant(value_ints=[0]))
    last = op.Squeeze(entries[-1], op.Constant(value_ints=[1]))
    return y, op.Transpose(last, perm=[0, 2, 1])


# What torch.onnx.export takes as `custom_translation_table`.
TRANSLATION: dict[Callable[..., Any], Callable[..., Any]] = {RECURRENCE: unrolled}
