"""The block of the model: residual addition, norm, mixer."""

from __future__ import annotations

import inspect
from typing import Any

from timm.layers import DropPath
from torch import Tensor, nn

from vim.layers.plain_block import plain_weights
from vim.ops.bidirectional_block.interface import run_bidirectional_block


class Block(nn.Module):
    """Residual addition, norm and mixer, without an MLP or a second norm.

    The next block (or the final norm) adds the mixer's output to the residual, so that addition and norm are one pass.
    Stochastic depth therefore acts on the input of a block.

    If norm and mixer are plain modules without hooks, `vim.ops.bidirectional_block` runs instead of them.

    Args:
        mixer: Module that maps (batch, len, dim) to the same shape.
        norm: Module that maps (x, residual) to (normalised sum, sum).
        drop_path: Probability that a sample skips the output of the previous block.

    Raises:
        TypeError: The norm takes no residual.

    Source: Zhu et al. 2024, arXiv:2401.09417, section 3.3.
    """

    def __init__(self, mixer: nn.Module, norm: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        _check_norm(norm)
        self.mixer = mixer
        self.norm = norm
        self.drop_path = self.make_drop_path(drop_path)

    @staticmethod
    def make_drop_path(rate: float) -> nn.Module:
        """Return stochastic depth, or `nn.Identity` at a rate of 0."""
        return DropPath(rate) if rate > 0.0 else nn.Identity()

    def forward(
        self, hidden_states: Tensor | tuple[Tensor, Tensor | None], residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the mixer's output and the residual for the next block, (batch, len, dim) each.

        Args:
            hidden_states: (batch, len, dim), or the pair that the previous block returned, as in `nn.Sequential`.
            residual: (batch, len, dim), or `None` in the first block.
        """
        if isinstance(hidden_states, tuple):
            if residual is not None:
                raise TypeError("residual must be left out where hidden_states is what a block returned")
            return self.forward(*hidden_states)
        x = hidden_states if residual is None else self.drop_path(hidden_states)
        norm: Any = self.norm
        mixer: Any = self.mixer
        weights = plain_weights(norm, mixer, x, residual)
        if weights is not None:
            return run_bidirectional_block(x, residual, weights, norm.eps, mixer.merge)
        y, residual = norm(x, residual)
        return mixer(y), residual


def _check_norm(norm: nn.Module) -> None:
    try:
        inspect.signature(norm.forward).bind("x", "residual")
    except TypeError:
        raise TypeError(
            f"norm must take (x, residual) and return their normalised sum and their sum, as vim.RMSNorm and "
            f"vim.layers.LayerNorm do, got {type(norm).__name__}"
        ) from None
