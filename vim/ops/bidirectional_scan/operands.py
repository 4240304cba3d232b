"""Operands of the bidirectional scan, one direction at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class ScanOperands(NamedTuple):
    """Operands of one direction of a bidirectional scan.

    Attributes:
        u: Input (the convolution's output), (batch, len, dim).
        x_dbl: Output of x_proj, (batch, len, dt_rank + 2 d_state): dt, B and C side by side. Rows may be padded.
        dt_weight: Weight of dt_proj, (dim, dt_rank).
        dt_bias: Bias of dt_proj, added before softplus, (dim,).
        A_log: The decay is A = -exp(A_log), (dim, d_state).
        D: Skip connection per channel, (dim,).
    """

    u: Tensor
    x_dbl: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor


def split_directions(operands: Sequence[Tensor]) -> tuple[ScanOperands, ScanOperands]:
    """Return the forward and the backward operands, which are the first twelve arguments of the registered op."""
    return ScanOperands(*operands[:6]), ScanOperands(*operands[6:12])
