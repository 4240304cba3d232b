"""Position embeddings of sequences with the class token at any place."""

from __future__ import annotations

import itertools

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

CLS_POSITIONS = ("none", "head", "middle", "double", "random")


def cls_indices(cls_position: str, num_patches: int) -> tuple[int, ...]:
    """Places of the class tokens in a sequence of `num_patches` patches, in ascending order.

    Args:
        cls_position: "none", "head" (first), "middle" (after half of the patches) or "double" (first and last);
            "random" has no place of its own and counts as "head" here.
        num_patches: Patches in the sequence.
    """
    if cls_position == "none":
        return ()
    if cls_position == "middle":
        return (num_patches // 2,)
    return (0, num_patches + 1) if cls_position == "double" else (0,)


def insert_tokens(patches: Tensor, tokens: list[Tensor], indices: tuple[int, ...]) -> Tensor:
    """Insert `tokens`, (batch, 1, dim) each, so that they end up at `indices`; (batch, patches + tokens, dim)."""
    pieces, taken = [], 0
    for placed, (token, index) in enumerate(zip(tokens, indices, strict=True)):
        pieces += [patches[:, taken : index - placed], token]
        taken = index - placed
    return torch.cat([*pieces, patches[:, taken:]], dim=1)


def extract_tokens(sequence: Tensor, indices: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    """Undo `insert_tokens`: the tokens at `indices`, (batch, 1, dim) each, and the patches, (batch, patches, dim)."""
    tokens = [sequence[:, i : i + 1] for i in indices]
    bounds = [-1, *indices, sequence.shape[1]]
    patches = [sequence[:, start + 1 : stop] for start, stop in itertools.pairwise(bounds)]
    return tokens, torch.cat(patches, dim=1) if indices else sequence


def resample_pos_embed(
    pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], cls_position: str
) -> Tensor:
    """Resample a position embedding to another grid; the class tokens keep theirs and move to their new places.

    Args:
        pos_embed: (1, patches + class tokens, dim), in the order of the sequence.
        old_grid, new_grid: Patches along (height, width).
        cls_position: Place of the class tokens, see `cls_indices`.

    Returns:
        (1, new patches + class tokens, dim), bicubic without antialiasing, as the original resamples.
    """
    if old_grid == new_grid:
        return pos_embed
    tokens, grid = extract_tokens(pos_embed, cls_indices(cls_position, old_grid[0] * old_grid[1]))
    grid = resample_abs_pos_embed(
        grid, new_size=list(new_grid), old_size=list(old_grid), num_prefix_tokens=0, antialias=False
    )
    return insert_tokens(grid, tokens, cls_indices(cls_position, new_grid[0] * new_grid[1]))
