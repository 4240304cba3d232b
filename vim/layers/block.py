"""One layer of the model: residual addition, norm, mixer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vim.layers.watched import is_watched
from vim.layers.whole_block import forget_whole_block, ready_block
from vim.ops import ReadyBlock, bidirectional_blocks


class Block(nn.Module):
    """Add the residual, normalise, mix. There is no MLP and no second norm.

    The mixer's output is added to the residual by the next block (or the final norm), so that addition and norm are
    one pass; stochastic depth therefore acts on what the block receives.

    Args:
        mixer: Module from (batch, len, dim) to the same.
        norm: Module from (x, residual) to (normalised sum, sum).
        drop_path: Probability that a sample skips what the block before has added.

    Source: Zhu et al. 2024, arXiv:2401.09417, section 3.3.
    """

    def __init__(self, mixer: nn.Module, norm: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = norm
        self.drop_path = self.make_drop_path(drop_path)

    @staticmethod
    def make_drop_path(rate: float) -> nn.Module:
        """Stochastic depth, or nothing at a rate of 0."""
        return DropPath(rate) if rate > 0.0 else nn.Identity()

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the mixer's output and the residual for the next block, (batch, len, dim) each."""
        if residual is not None:
            hidden_states = self.drop_path(hidden_states)
        ready = ready_block(self.norm, self.mixer, hidden_states, residual)
        if ready is not None:
            return bidirectional_blocks(hidden_states, residual, [ready])
        hidden_states, residual = self.norm(hidden_states, residual)
        return self.mixer(hidden_states), residual

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Block:
        """Move or cast, as every module does; what was prepared of the weights is given back first."""
        forget_whole_block(self.mixer)
        return super()._apply(fn, recurse)


_forward = Block.forward  # a class may be given another one


def run_blocks_at_once(
    blocks: Iterable[nn.Module], x: Tensor, take: Collection[int] = ()
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]] | None:
    """What blocks put out one after the other, in one call; `None` where one of them has to be called itself.

    All of them are made ready before the first one runs: no code of the user's runs in between, and what is read for
    that stays in the processor's caches.

    Args:
        blocks: Those of a model.
        x: What the first one gets, (batch, len, dim).
        take: Numbers of the blocks whose output is wanted besides.

    Returns:
        Hidden state and residual after the last block, and both after each block in `take`; (batch, len, dim) each.
    """
    ready = _ready_blocks(blocks, x)
    if not ready:
        return None
    residual: Tensor | None = None
    taken: list[tuple[Tensor, Tensor]] = []
    first, final = 0, len(ready) - 1
    for last in sorted({*(i for i in take if i < final), final}):
        x, residual = bidirectional_blocks(x, residual, ready[first : last + 1])
        first = last + 1
        if last in take:
            taken.append((x, residual))
    assert residual is not None
    return x, residual, taken


def _ready_blocks(blocks: Iterable[nn.Module], x: Tensor) -> list[ReadyBlock] | None:
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    ready = []
    for block in blocks:
        if type(block) is not Block or is_watched(block) or Block.forward is not _forward or _drops(block.drop_path):
            return None
        one = ready_block(block.norm, block.mixer, x, None)
        if one is None:
            return None
        ready.append(one)
    return ready


def _drops(drop_path: nn.Module) -> bool:
    """Whether it may do anything to what it gets."""
    passes = type(drop_path) is nn.Identity or (type(drop_path) is DropPath and not drop_path.training)
    return not passes or is_watched(drop_path)
