"""The norms of mamba-ssm, on `vim.ops`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim import ops

_Normed = Tensor | tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """RMSNorm with mamba-ssm's arguments; the residual is optional.

    Args:
        hidden_size: Size of the last axis.
        eps: Added to the mean square.
        dropout_p: Must be 0.
        device, dtype: Of the scale.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        refuse_extras(dropout_p=dropout_p)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Set the scale to one."""
        nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> _Normed:
        """Return the normalised sum, with `prenorm` also the sum."""
        return _normalise(x, self.weight, None, residual, self.eps, prenorm, residual_in_fp32, True)


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> _Normed:
    """Add a residual and normalise, as mamba-ssm 2's `layer_norm_fn`.

    Args:
        x: (..., dim).
        weight, bias: (dim,).
        residual: Like `x`, added before the norm.
        x1, weight1, bias1, rowscale: Must be `None`.
        eps: Added to the variance, or to the mean square.
        dropout_p: Must be 0.
        prenorm: Also return the sum of `x` and `residual`.
        residual_in_fp32: Return that sum in float32 if `residual` is `None`; otherwise it has the residual's dtype.
        is_rms_norm: Divide by the root mean square, without subtracting the mean.
        return_dropout_mask: Must be False.

    Raises:
        ValueError: An argument that must be left out is given.
    """
    refuse_extras(
        x1=x1,
        weight1=weight1,
        bias1=bias1,
        dropout_p=dropout_p,
        rowscale=rowscale,
        return_dropout_mask=return_dropout_mask,
    )
    return _normalise(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> _Normed:
    """Add a residual and divide by the root mean square, as mamba-ssm 2's `rms_norm_fn`; see `layer_norm_fn`."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32,
        is_rms_norm=True, return_dropout_mask=return_dropout_mask,
    )  # fmt: skip


def layer_norm_fn_1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> _Normed:
    """Add a residual and normalise, in the argument order of mamba-ssm 1; see `layer_norm_fn`."""
    return _normalise(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm)


def rms_norm_fn_1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> _Normed:
    """Add a residual and divide by the root mean square, in the argument order of mamba-ssm 1; see `layer_norm_fn`."""
    return _normalise(x, weight, bias, residual, eps, prenorm, residual_in_fp32, True)


def refuse_extras(**arguments: object) -> None:
    """Raise for an argument of mamba-ssm 2's norms that no Mamba-1 model uses."""
    for name, value in arguments.items():
        if isinstance(value, Tensor) or value:
            raise ValueError(f"{name} must be left out: vim.compat's norms have no second branch and no dropout")


def _normalise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    prenorm: bool,
    residual_in_fp32: bool,
    is_rms_norm: bool,
) -> _Normed:
    if is_rms_norm:
        y, total = ops.add_rms_norm(x, residual, weight, eps)
        y = y if bias is None else y + bias.to(y.dtype)
    else:
        wide = torch.promote_types(x.dtype, torch.float32)
        total = x.to(wide) if residual is None else x + residual.to(wide)
        scale, shift = (None if t is None else t.to(wide) for t in (weight, bias))
        y = F.layer_norm(total, total.shape[-1:], scale, shift, eps).to(x.dtype)
    if not prenorm:
        return y
    kept = x.dtype if residual is None else residual.dtype
    return y, total.to(torch.promote_types(kept, torch.float32) if residual is None and residual_in_fp32 else kept)
