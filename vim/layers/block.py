"""One layer of the model: residual addition, norm, mixer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.layers import DropPath
from torch import Tensor, nn

from vim.layers.whole_block import forget_whole_block, run_whole_block


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
        at_once = run_whole_block(self.norm, self.mixer, hidden_states, residual)
        if at_once is not None:
            return at_once
        hidden_states, residual = self.norm(hidden_states, residual)
        return self.mixer(hidden_states), residual

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Block:
        """Move or cast, as every module does; what was prepared of the weights is given back first."""
        forget_whole_block(self.mixer)
        return super()._apply(fn, recurse)
