"""Order of the tokens in a sequence: insert and extract class tokens, and undo permutations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vim.ops.common.eager import is_eager


def insert_tokens(patches: Tensor, tokens: list[Tensor], indices: tuple[int, ...]) -> Tensor:
    """Insert `tokens`, (batch, 1, dim) each, so that they end up at `indices`.

    Returns:
        (batch, patches + tokens, dim).
    """
    pieces, taken = [], 0
    for placed, (token, index) in enumerate(zip(tokens, indices, strict=True)):
        pieces += [patches[:, taken : index - placed], token]
        taken = index - placed
    return torch.cat([*pieces, patches[:, taken:]], dim=1)


def extract_tokens(sequence: Tensor, indices: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    """Undo `insert_tokens`.

    Returns:
        The tokens at `indices`, (batch, 1, dim) each, and the patches, (batch, patches, dim).
    """
    tokens, patches = _split(sequence, indices)
    return tokens, torch.cat(patches, dim=1) if indices else sequence


def _split(sequence: Tensor, indices: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tokens at `indices`, and the slices of patches between them."""
    tokens = [sequence[:, i : i + 1] for i in indices]
    starts, stops = (0, *(i + 1 for i in indices)), (*indices, None)
    return tokens, [sequence[:, start:stop] for start, stop in zip(starts, stops, strict=True)]


class TokenSequence(NamedTuple):
    """Record of the steps that put tokens into scan order.

    Attributes:
        grid: Patches along (height, width).
        places: Positions at which the class tokens were inserted.
        order: Permutation that was applied next, (len,), or `None`.
        flipped: True if the sequence was reversed after that.
    """

    grid: tuple[int, int]
    places: tuple[int, ...]
    order: Tensor | None
    flipped: bool

    def read_out(self) -> tuple[int, ...]:
        """Return the positions at which class tokens are read: after the permutation, but before the reversal."""
        if self.order is None:
            return self.places
        return tuple(int((self.order == place).nonzero()) for place in self.places)

    def undo(self, x: Tensor) -> Tensor:
        """Undo reversal and permutation of tokens, (batch, len, dim)."""
        x = x.flip(1) if self.flipped else x
        return x if self.order is None else x[:, torch.argsort(self.order)]


def class_tokens_first(x: Tensor, indices: tuple[int, ...]) -> Tensor:
    """Move the tokens at `indices` to the front, in that order; the other tokens keep their order.

    Returns:
        (batch, len, dim).
    """
    # By rank, not by value: in an export for images of any size, indices are symbols, which cannot be hashed.
    ranks = sorted(range(len(indices)), key=indices.__getitem__)
    tokens, patches = _split(x, tuple(indices[i] for i in ranks))
    return _join([*(tokens[ranks.index(i)] for i in range(len(indices))), *patches])


def _join(pieces: list[Tensor]) -> Tensor:
    """Concatenate along the token axis.

    In CPU inference small batches are copied in chunks below PyTorch's threshold for parallel copies. After a parallel
    copy PyTorch's threads spin for milliseconds on the processors that the next call needs. That cost 6 of 32 ms for
    Vim-Ti on two cores.
    """
    is_plain = type(pieces[0]) is Tensor and is_eager() and not torch.is_grad_enabled() and pieces[0].is_cpu
    if not is_plain or len(pieces[0]) > _MAX_SERIAL_BATCH:
        return torch.cat(pieces, dim=1)
    batch, _, dim = pieces[0].shape
    joined = pieces[0].new_empty(batch, sum(p.shape[1] for p in pieces), dim)
    chunk, first = max(1, _PARALLEL_COPY_SIZE // (dim + 1)), 0
    for piece in pieces:
        for start in range(0, piece.shape[1], chunk):
            part = piece[:, start : start + chunk]
            for b in range(batch):
                joined[b, first + start : first + start + part.shape[1]].copy_(part[b])
        first += piece.shape[1]
    return joined


# Elements from which PyTorch copies in parallel, and the largest batch that is faster without it.
_PARALLEL_COPY_SIZE = 32768
_MAX_SERIAL_BATCH = 2
