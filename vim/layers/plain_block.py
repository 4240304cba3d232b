"""Test for blocks of plain modules without hooks, which one op may compute instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vim.layers.mixer import Mamba
from vim.layers.norm import RMSNorm
from vim.layers.watched import DefinedForwards, is_causal_convolution, is_watched
from vim.ops.bidirectional_block.interface import OPTIONAL_WEIGHTS, BlockWeights, runs_block

_LINEAR = ("in_proj", "x_proj", "dt_proj", "x_proj_b", "dt_proj_b", "out_proj")
_READ = (*_LINEAR, "conv1d", "conv1d_b")
# Indices of the weights that the op requires.
_REQUIRED = [i for i, name in enumerate(BlockWeights._fields) if name not in OPTIONAL_WEIGHTS]
_FORWARDS = DefinedForwards((Mamba, RMSNorm, nn.Linear, nn.Conv1d, nn.SiLU), ("linear", "conv1d", "silu"))


def plain_weights(norm: nn.Module, mixer: nn.Module, x: Tensor, residual: Tensor | None) -> BlockWeights | None:
    """Return the weights of a norm and a mixer for `bidirectional_block`, or `None` if the modules must be called.

    They must be called if they have hooks, another class or geometry, or tensor subclasses as weights. They must also
    be called while a graph is recorded.
    """
    if not (runs_block(x, residual) and type(mixer) is Mamba and type(norm) is RMSNorm and _is_plain(norm, mixer)):
        return None
    weights = _weights(norm, mixer)
    return weights if weights is not None and _fit(weights, x, residual) else None


def _is_plain(norm: RMSNorm, mixer: Mamba) -> bool:
    parts: dict[str, Any] = mixer._modules
    linear = [parts.get(name) for name in _LINEAR]
    return (
        mixer.directions == "v2"
        and mixer.merge in ("mean", "sum")
        and mixer.gamma is None
        and isinstance(norm.eps, float)  # the user may have set anything
        and norm.eps > 0
        and _FORWARDS.run()
        and not (is_watched(norm) or is_watched(mixer))
        and all(type(part) is nn.Linear and not is_watched(part) for part in linear)
        and is_causal_convolution(parts.get("conv1d"), parts.get("act"))
        and is_causal_convolution(parts.get("conv1d_b"), parts.get("act"))
    )


def _weights(norm: RMSNorm, mixer: Mamba) -> BlockWeights | None:
    """Return all weights if each is a plain parameter or tensor under its usual name, else `None`."""
    own: dict[str, Any] = mixer._parameters
    modules: dict[str, Any] = mixer._modules
    parts = {name: modules[name]._parameters for name in _READ}
    try:
        if parts["x_proj"]["bias"] is not None or parts["x_proj_b"]["bias"] is not None:
            return None
        weights = BlockWeights(
            norm._parameters["weight"],  # type: ignore[arg-type]
            parts["in_proj"]["weight"],
            parts["in_proj"]["bias"],
            parts["conv1d"]["weight"],
            parts["conv1d"]["bias"],
            parts["x_proj"]["weight"],
            parts["dt_proj"]["weight"],
            parts["dt_proj"]["bias"],
            own["A_log"],
            own["D"],
            parts["conv1d_b"]["weight"],
            parts["conv1d_b"]["bias"],
            parts["x_proj_b"]["weight"],
            parts["dt_proj_b"]["weight"],
            parts["dt_proj_b"]["bias"],
            own["A_b_log"],
            own["D_b"],
            parts["out_proj"]["weight"],
            parts["out_proj"]["bias"],
        )
    except KeyError:  # a weight is a buffer, an attribute or a parametrization
        return None
    if any(weights[i] is None for i in _REQUIRED):
        return None
    return weights if all(type(w) is nn.Parameter or type(w) is Tensor or w is None for w in weights) else None


def _fit(weights: BlockWeights, x: Tensor, residual: Tensor | None) -> bool:
    """Return True if the op takes the sizes, dtypes and layouts; the modules take more."""
    products = (weights.in_proj, weights.in_bias, weights.x_proj, weights.x_proj_b, weights.out_proj, weights.out_bias)
    # Linear layers demand the dtype of `x`; autocast casts both.
    any_dtype = torch.is_autocast_enabled(x.device.type)
    return (
        (residual is None or (residual.shape == x.shape and residual.dtype is _sum_dtype(x)))
        and weights.conv_weight.shape == weights.conv_weight_b.shape
        and weights.out_proj.shape[0] == x.shape[2]
        and all(w is None or ((any_dtype or w.dtype is x.dtype) and w.layout is torch.strided) for w in products)
    )


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32
