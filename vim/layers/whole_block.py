"""A block in one call of the native library, in inference on the CPU, where nobody watches its parts."""

from __future__ import annotations

from operator import attrgetter, itemgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from vim.layers.linear import Linear
from vim.layers.mixer import Mamba
from vim.layers.norm import RMSNorm
from vim.layers.watched import is_watched
from vim.ops import BlockWeights, PreparedBlock, ReadyBlock, block_runs_at_once

_PRODUCTS = ("in_proj", "x_proj", "x_proj_b", "out_proj")
_READ_BY_KERNELS = {"conv1d": nn.Conv1d, "conv1d_b": nn.Conv1d, "dt_proj": nn.Linear, "dt_proj_b": nn.Linear}
_PARTS: dict[str, type[nn.Module]] = {**dict.fromkeys(_PRODUCTS, Linear), **_READ_BY_KERNELS}
_parts, _parameters = itemgetter(*_PARTS), attrgetter("_parameters")
# A class may be given another one.
_FORWARDS = (Mamba.forward, RMSNorm.forward, Linear.forward)

_prepared: WeakKeyDictionary[nn.Module, PreparedBlock] = WeakKeyDictionary()


def ready_block(norm: nn.Module, mixer: nn.Module, x: Tensor, residual: Tensor | None) -> ReadyBlock | None:
    """The block of these two modules as one call; `None` where they have to be called.

    Args:
        norm: The block's norm.
        mixer: The block's mixer.
        x: (batch, len, dim).
        residual: Like `x`, or `None`.
    """
    # These first, so that a compiler sees nothing of the rest.
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    if type(mixer) is not Mamba or type(norm) is not RMSNorm or mixer.directions != "v2" or mixer.gamma is not None:
        return None
    if _needs_its_modules(norm, mixer):
        return None
    weights = _weights(norm, mixer)
    if not block_runs_at_once(x, residual, weights):
        return None
    prepared = _prepared.get(mixer)
    operands = None if prepared is None else prepared.operands(weights)
    if operands is None:
        prepared = _prepared[mixer] = PreparedBlock(weights)
        operands = prepared.operands(weights)
    return ReadyBlock(operands, norm.eps, mixer.merge) if operands else None


def forget_whole_block(mixer: nn.Module) -> None:
    """Give back the memory of what was prepared of a block whose weights are about to be moved or cast."""
    _prepared.pop(mixer, None)


def _needs_its_modules(norm: nn.Module, mixer: Mamba) -> bool:
    """Whether a part is watched, of another class, or has a bias that the call would not know of."""
    if torch_module._has_any_global_hook() or is_watched(norm) or is_watched(mixer):
        return True
    if (Mamba.forward, RMSNorm.forward, Linear.forward) != _FORWARDS:
        return True
    parts: dict[str, Any] = mixer._modules
    for name, kind in _PARTS.items():
        part = parts.get(name)
        # A bias that is not among the parameters may be an attribute or a buffer.
        if part is None or type(part) is not kind or is_watched(part) or "bias" not in part._parameters:
            return True
    return parts["x_proj"]._parameters["bias"] is not None or parts["x_proj_b"]._parameters["bias"] is not None


def _weights(norm: nn.Module, mixer: Mamba) -> BlockWeights:
    """What is there; `PreparedBlock` sees to what is not."""
    own: Any = mixer._parameters
    scale: Any = norm._parameters.get("weight")
    in_proj, x_proj, x_proj_b, out_proj, conv1d, conv1d_b, dt_proj, dt_proj_b = map(_parameters, _parts(mixer._modules))
    return BlockWeights(
        scale,
        in_proj.get("weight"),
        in_proj.get("bias"),
        conv1d.get("weight"),
        conv1d.get("bias"),
        x_proj.get("weight"),
        dt_proj.get("weight"),
        dt_proj.get("bias"),
        own.get("A_log"),
        own.get("D"),
        conv1d_b.get("weight"),
        conv1d_b.get("bias"),
        x_proj_b.get("weight"),
        dt_proj_b.get("weight"),
        dt_proj_b.get("bias"),
        own.get("A_b_log"),
        own.get("D_b"),
        out_proj.get("weight"),
        out_proj.get("bias"),
    )
