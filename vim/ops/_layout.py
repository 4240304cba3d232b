"""Memory layout and precision that every backend agrees on."""

from __future__ import annotations

from collections.abc import Iterable

import torch

# Tokens between two saved states. A backward pass rebuilds the states of one chunk at a time.
CHECKPOINT_EVERY = 64


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of states, decays, softplus, weights and sums: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_dtype(dtype: torch.dtype, tensors: Iterable[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The tensors in this dtype; those that have it already, and `None`, as they are."""
    return [t if t is None or t.dtype is dtype else t.to(dtype) for t in tensors]


def empty_like_layout(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor like `x` (batch, dim, len): channel-last in memory where `x` is, contiguous elsewhere."""
    batch, dim, seqlen = x.shape
    if x.stride(1) == 1 and x.stride(2) != 1:
        return x.new_empty(batch, seqlen, dim).transpose(1, 2)
    return x.new_empty(batch, dim, seqlen)


def num_chunks(seqlen: int, checkpoint_every: int) -> int:
    """Number of chunks whose entry states are saved; none where `checkpoint_every` is 0."""
    return 0 if checkpoint_every == 0 else (seqlen + checkpoint_every - 1) // checkpoint_every
