"""Position embeddings of sequences with the class token at any place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vim.layers.token_sequence import extract_tokens, insert_tokens
from vim.ops.common.checks import check_memory

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

    Raises:
        RuntimeError: The memory of `pos_embed` was freed or cut short.
    """
    check_memory("pos_embed", pos_embed)
    # A symbol, in an export for images of any size, is not compared: that would pin it to one side of the question.
    if not any(isinstance(side, torch.SymInt) for side in new_grid) and old_grid == new_grid:
        return pos_embed
    tokens, grid = extract_tokens(pos_embed, cls_indices(cls_position, old_grid[0] * old_grid[1]))
    maps = grid.unflatten(1, old_grid).permute(0, 3, 1, 2).float()
    maps = F.interpolate(maps, size=new_grid, mode="bicubic", align_corners=False)
    grid = maps.flatten(2).mT.to(pos_embed.dtype)
    return insert_tokens(grid, tokens, cls_indices(cls_position, new_grid[0] * new_grid[1]))
