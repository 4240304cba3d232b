"""Position embeddings of sequences with class tokens at any position."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vim.layers.token_sequence import extract_tokens, insert_tokens
from vim.layers.traced import is_symbolic
from vim.ops.common.checks import check_memory

CLS_POSITIONS = ("none", "head", "middle", "double", "random")


def cls_indices(cls_position: str, num_patches: int) -> tuple[int, ...]:
    """Return the positions of the class tokens in a sequence of `num_patches` patches, in ascending order.

    Args:
        cls_position: "none", "head" (first), "middle" (after half of the patches) or "double" (first and last);
            "random" counts as "head" here.
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
    """Resample a position embedding to another grid; class tokens keep their vectors and move to the new positions.

    Args:
        pos_embed: (1, patches + class tokens, dim), in the order of the sequence.
        old_grid, new_grid: Patches along (height, width).
        cls_position: Position of the class tokens, see `cls_indices`.

    Returns:
        (1, new patches + class tokens, dim), bicubic without antialiasing, as in the original.

    Raises:
        RuntimeError: The memory of `pos_embed` was freed or truncated.
    """
    check_memory("pos_embed", pos_embed)
    if not is_symbolic(new_grid) and old_grid == new_grid:
        return pos_embed
    tokens, patches = extract_tokens(pos_embed, cls_indices(cls_position, old_grid[0] * old_grid[1]))
    patches = resample_grid(patches, old_grid, new_grid)
    return insert_tokens(patches, tokens, cls_indices(cls_position, new_grid[0] * new_grid[1]))


def resample_grid(patches: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resample vectors on a grid, (1, old patches, dim) -> (1, new patches, dim); bicubic in float32."""
    maps = rearrange(patches.float(), "b (h w) c -> b c h w", h=old_grid[0], w=old_grid[1])
    maps = F.interpolate(maps, size=new_grid, mode="bicubic", align_corners=False)
    return rearrange(maps, "b c h w -> b (h w) c").to(patches.dtype)
