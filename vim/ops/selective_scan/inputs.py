"""Arguments of the registered scans, and the kinds of B and C."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class ScanInputs(NamedTuple):
    """Arguments of `vim::segmented_scan`, in the order of its schema.

    Attributes:
        u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus, reverse: See
            `vim.ops.selective_scan`.
        checkpoint_every: Tokens between the states that are returned for a backward pass; 0 returns none.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None
    seq_idx: Tensor | None
    delta_softplus: bool
    reverse: bool
    checkpoint_every: int


TENSORS = 10
# Tensors of `vim::selective_scan`, which has neither an initial state nor sequence indices.
PLAIN_TENSORS = 8


def segmented(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the segmented op's arguments for a call of the plain op.

    Args:
        arguments: The arguments of `vim::selective_scan`, or those of `vim::selective_scan_backward` after the
            gradients of out and last state.
    """
    return *arguments[:PLAIN_TENSORS], None, None, *arguments[PLAIN_TENSORS:]


def split_backward(arguments: tuple[Any, ...]) -> tuple[ScanInputs, Tensor]:
    """Return the forward op's arguments and the entry states.

    Args:
        arguments: The arguments of `vim::segmented_scan_backward` after the gradients of out and last state.
    """
    return ScanInputs(*arguments[:TENSORS], *arguments[TENSORS + 1 :]), arguments[TENSORS]


def is_constant(B: Tensor) -> bool:
    """Return True if B or C is the same for all tokens, (dim, d_state)."""
    return B.dim() == 2
