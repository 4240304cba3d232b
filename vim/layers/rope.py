"""Rotary position tables for tokens on a grid."""

from __future__ import annotations

import torch
from einops import repeat
from torch import Tensor, nn

from vim.layers.traced import fx_leaf, is_symbolic


class GridRotary(nn.Module):
    """Rotation of neighbouring channels of each patch token by angles of its row and column.

    With d = dim / 2, the first d channels turn by row * f_k and the last d by column * f_k, where
    f_k = 10000^(-2k/d). Each f_k serves a pair of channels: (a, b) -> (a cos - b sin, b cos + a sin).
    Rows and columns are scaled to a grid with `pretrained_side` cells on each side.

    Args:
        dim: Width of the tokens, a multiple of 4.
        grid_size: Patches along (height, width); their number must be even.
        pretrained_side: Side of the grid on which the frequencies are defined.

    Shape:
        (batch, len, dim), and `tables` for another grid -> (batch, len, dim). With an odd `len` the first token is not
        rotated: it is the class token if that comes first. (The original does the same if it is in the middle.)

    Raises:
        ValueError: `dim` is not a multiple of 4, or the number of patches is odd.

    Source: Su et al. 2021, arXiv:2104.09864, for one axis. The tables are part of the released state dicts.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(
        self,
        dim: int,
        grid_size: tuple[int, int],
        pretrained_side: int = 14,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(f"embed_dim must be a multiple of 4 for rotary tables, got {dim}")
        _check_grid(grid_size)
        self.dim, self.grid_size, self.pretrained_side = dim, grid_size, pretrained_side
        cells = grid_size[0] * grid_size[1]
        for name in ("freqs_cos", "freqs_sin"):
            self.register_buffer(name, torch.empty(cells, dim, device=device, dtype=dtype))
        self.init_tables()

    @torch.no_grad()
    def init_tables(self) -> None:
        """Compute the tables, (patches, dim) each."""
        cos, sin = self._make_tables(self.grid_size)
        self.freqs_cos.copy_(cos)
        self.freqs_sin.copy_(sin)

    def tables(self, grid_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines for patches on `grid_size`, (patches, dim) each."""
        if not is_symbolic(grid_size) and grid_size == self.grid_size:
            return self.freqs_cos, self.freqs_sin
        _check_grid(grid_size)
        cos, sin = self._make_tables(grid_size)
        return cos.to(self.freqs_cos), sin.to(self.freqs_sin)

    def _make_tables(self, grid_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        half = self.dim // 2
        frequencies = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float32) / half)
        rows, columns = (torch.arange(side, dtype=torch.float32) / side * self.pretrained_side for side in grid_size)
        cells = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)  # (rows, columns, 2)
        angles = cells[..., None] * frequencies
        angles = repeat(angles, "rows columns side f -> (rows columns) (side f pair)", pair=2)
        return angles.cos(), angles.sin()

    @fx_leaf
    def forward(self, tokens: Tensor, tables: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Rotate the patch tokens."""
        cos, sin = (self.freqs_cos, self.freqs_sin) if tables is None else tables
        first, rest = tokens.split([tokens.shape[1] % 2, tokens.shape[1] - tokens.shape[1] % 2], dim=1)
        pairs = rest.unflatten(-1, (-1, 2))
        swapped = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
        return torch.cat((first, rest * cos + swapped * sin), dim=1).to(tokens.dtype)


def _check_grid(grid_size: tuple[int, int]) -> None:
    if grid_size[0] * grid_size[1] % 2:
        raise ValueError(f"rotary tables need an even number of patches, got the grid {tuple(grid_size)}")
