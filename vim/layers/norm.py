"""Norms that add the residual first and return the sum as well."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vim.layers.traced import fx_leaf
from vim.ops import add_rms_norm


class RMSNorm(nn.Module):
    """Residual addition and RMSNorm.

    Args:
        dim: Size of the last axis.
        eps: Added to the mean square.

    Shape:
        x (..., dim), residual (..., dim) or `None` -> y (..., dim) in the dtype of x, and x + residual in float32
        (float64 for float64 x).

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set the scale to one."""
        nn.init.ones_(self.weight)

    @fx_leaf
    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the normalised sum and the sum."""
        return add_rms_norm(x, residual, self.weight, self.eps)


class AddResidual(nn.Module):
    """Residual addition alone, which replaces a pruned norm; shapes as for `RMSNorm`."""

    @fx_leaf
    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the sum in the dtype of x, and the sum."""
        r = _add(x, residual)
        return r.to(x.dtype), r


class LayerNorm(nn.LayerNorm):
    """Residual addition and LayerNorm, with statistics in float32; shapes as for `RMSNorm`.

    Source: Ba et al. 2016, arXiv:1607.06450.
    """

    @fx_leaf
    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the normalised sum and the sum."""
        r = _add(x, residual)
        weight, bias = self.weight.to(r.dtype), self.bias.to(r.dtype)
        y = nn.functional.layer_norm(r, self.normalized_shape, weight, bias, self.eps)
        return y.to(x.dtype), r


def _add(x: Tensor, residual: Tensor | None) -> Tensor:
    """Return x + residual in float32, or in float64 for float64 x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide) if residual is None else x + residual.to(wide)
