"""Initialisation, with the original's distributions."""

from __future__ import annotations

import math

import torch
from timm.layers import lecun_normal_, trunc_normal_
from torch import Tensor, nn
from torch.nn.init import kaiming_uniform_, zeros_


@torch.no_grad()
def init_dt_proj(
    dt_proj: nn.Linear,
    dt_min: float,
    dt_max: float,
    dt_scale: float,
    dt_init_floor: float,
    constant: bool = False,
) -> None:
    """Initialise a step size projection so that softplus(bias) is log-uniform in [dt_min, dt_max].

    Args:
        dt_proj: Linear layer (dt_rank -> d_inner) with a bias; changed in place.
        dt_min, dt_max: Range of the step size.
        dt_scale: Factor on the bound dt_rank ** -0.5 of the uniform weight.
        dt_init_floor: Smallest step size.
        constant: Fill the weight with its bound instead of drawing it.

    Source: Gu and Dao 2023, arXiv:2312.00752, section 3.6.
    """
    weight, bias = dt_proj.weight, dt_proj.bias
    bound = weight.shape[1] ** -0.5 * dt_scale
    if constant:
        weight.fill_(bound)
    else:
        weight.uniform_(-bound, bound)
    uniform = torch.rand(bias.shape, device=bias.device, dtype=torch.float32)
    dt = torch.exp(math.log(dt_min) + uniform * (math.log(dt_max) - math.log(dt_min))).clamp(min=dt_init_floor)
    # The inverse of softplus: log(exp(dt) - 1).
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))


@torch.no_grad()
def init_out_proj(out_proj: nn.Linear, depth: int) -> None:
    """Initialise the last projection of a residual branch: PyTorch's distribution, scaled by 1 / sqrt(depth).

    Source: Radford et al. 2019 (GPT-2), section 2.3.
    """
    kaiming_uniform_(out_proj.weight, a=math.sqrt(5))
    out_proj.weight.div_(math.sqrt(depth))
    init_bias(out_proj)


@torch.no_grad()
def init_patch_embed(proj: nn.Conv2d) -> None:
    """Draw a LeCun-normal weight, and zero the bias."""
    lecun_normal_(proj.weight)
    init_bias(proj)


@torch.no_grad()
def init_head(head: nn.Module) -> None:
    """Draw a truncated normal weight of standard deviation 0.02, and zero the bias; `nn.Identity` is left as it is."""
    if isinstance(head, nn.Linear):
        init_token(head.weight)
        init_bias(head)


@torch.no_grad()
def init_token(token: Tensor) -> None:
    """Fill a token or a position embedding from a truncated normal of standard deviation 0.02."""
    trunc_normal_(token, std=0.02)


@torch.no_grad()
def init_bias(layer: nn.Module) -> None:
    """Zero the bias of a layer, if it has one."""
    if layer.bias is not None:
        zeros_(layer.bias)  # type: ignore[arg-type]
