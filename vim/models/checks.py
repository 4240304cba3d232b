"""Checks of what users ask of a model: each error names the argument and the value."""

from __future__ import annotations

import torch
from timm.models._features import feature_take_indices
from torch import Tensor


def check_order(name: str, order: Tensor, length: int) -> None:
    """Raise unless `order` is a permutation of `length` tokens."""
    if order.shape != (length,) or not torch.equal(order.sort().values, torch.arange(length, device=order.device)):
        raise ValueError(f"{name} must be a permutation of {length} tokens, got a tensor of shape {tuple(order.shape)}")


def check_blocks(indices: int | list[int] | None, depth: int) -> tuple[list[int], int]:
    """Return the blocks that `indices` selects, and the largest of them.

    Args:
        indices: The last n blocks, a list of blocks, or `None` for all, as in timm.
        depth: Number of blocks.
    """
    if isinstance(indices, int):
        if not 1 <= indices <= depth:
            raise ValueError(f"indices must be 1 to {depth} last blocks or a list of blocks, got {indices}")
    elif indices is not None:
        listed = list(indices) if isinstance(indices, (list, tuple, range)) else [None]
        if not listed or not all(isinstance(i, int) and -depth <= i < depth for i in listed):
            raise ValueError(f"indices must be a list of blocks, from {-depth} to {depth - 1}, got {indices!r}")
    return feature_take_indices(depth, indices)
