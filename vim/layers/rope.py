"""Rotary position tables for tokens on a grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GridRotary(nn.Module):
    """Rotate neighbouring channels of each patch token by angles of its row and column.

    With d = dim / 2, the first d channels turn by row * f_k and the last d by column * f_k, where
    f_k = 10000^(-2k/d) and each f_k serves a pair of channels: (a, b) -> (a cos - b sin, b cos + a sin).
    Rows and columns are counted in units of a grid with `pretrained_side` cells a side.

    Args:
        dim: Width of the tokens, a multiple of 4.
        grid_size: Patches along (height, width); their number must be even.
        pretrained_side: Side of the grid on which the frequencies are defined.

    Shape:
        (batch, len, dim) -> the same. With an odd `len` the first token is left as it is: the class token where it
        stands first. (The original does so too where it stands in the middle.)

    Raises:
        ValueError: `dim` is not a multiple of 4, or the number of patches is odd.

    Source: Su et al. 2021, arXiv:2104.09864, for one axis; the tables are part of the released state dicts.
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
        if grid_size[0] * grid_size[1] % 2:
            raise ValueError(f"rotary tables need an even number of patches, got the grid {grid_size}")
        self.dim, self.grid_size, self.pretrained_side = dim, grid_size, pretrained_side
        cells = grid_size[0] * grid_size[1]
        for name in ("freqs_cos", "freqs_sin"):
            self.register_buffer(name, torch.empty(cells, dim, device=device, dtype=dtype))
        self.init_tables()

    @torch.no_grad()
    def init_tables(self) -> None:
        """Fill the tables, (patches, dim)."""
        half = self.dim // 2
        frequencies = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float32) / half)
        rows, columns = (
            torch.arange(side, dtype=torch.float32) / side * self.pretrained_side for side in self.grid_size
        )
        angles = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)  # (rows, columns, 2)
        angles = (angles[..., None] * frequencies).repeat_interleave(2, dim=-1).flatten(2).flatten(0, 1)
        self.freqs_cos.copy_(angles.cos())
        self.freqs_sin.copy_(angles.sin())

    def forward(self, tokens: Tensor) -> Tensor:
        """Rotate the patch tokens."""
        first, rest = tokens.split([tokens.shape[1] % 2, tokens.shape[1] - tokens.shape[1] % 2], dim=1)
        pairs = rest.unflatten(-1, (-1, 2))
        swapped = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
        return torch.cat((first, rest * self.freqs_cos + swapped * self.freqs_sin), dim=1).to(tokens.dtype)
