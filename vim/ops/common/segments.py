"""Several sequences in one row of tokens: where each begins."""

from __future__ import annotations

import torch
from torch import Tensor


def find_restarts(seq_idx: Tensor, reverse: bool) -> Tensor:
    """Return a mask of the tokens whose index differs from the index of the token before in scan order, (batch, len).

    The first token of a row is never in the mask: it may continue a sequence.
    """
    first = torch.zeros_like(seq_idx[:, :1], dtype=torch.bool)
    changes = seq_idx[:, 1:] != seq_idx[:, :-1]
    return torch.cat([changes, first] if reverse else [first, changes], dim=1)


def number_sequences(seq_idx: Tensor) -> Tensor:
    """Return the number of each token's sequence in its row, from 0 on, (batch, len): an index may occur again."""
    return find_restarts(seq_idx, False).cumsum(1)
