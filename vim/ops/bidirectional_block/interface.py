"""`bidirectional_block`, the function for users; a layer of the model runs it where the layer's parts are plain."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vim.ops.backends.registry import resolve_backend, runs_by_default
from vim.ops.bidirectional_block import register as register
from vim.ops.bidirectional_scan.interface import MERGES
from vim.ops.common.checks import check_activation, check_axes, check_choice, check_length, check_operand
from vim.ops.common.eager import is_eager
from vim.ops.common.layout import accumulate_dtype, checkpoint_interval


class BlockWeights(NamedTuple):
    """Weights of a norm and a bidirectional mixer, of any floating dtype; `_b` is the backward direction.

    Attributes:
        norm_weight: (d_model,).
        in_proj, in_bias: (2 d_inner, d_model), and (2 d_inner,) or `None`.
        conv_weight, conv_bias: (d_inner, 1, d_conv), and (d_inner,) or `None`.
        x_proj: (dt_rank + 2 d_state, d_inner).
        dt_weight, dt_bias: (d_inner, dt_rank), and (d_inner,).
        A_log, D: (d_inner, d_state), and (d_inner,).
        out_proj, out_bias: (d_model, d_inner), and (d_model,) or `None`.
    """

    norm_weight: Tensor
    in_proj: Tensor
    in_bias: Tensor | None
    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    conv_weight_b: Tensor
    conv_bias_b: Tensor | None
    x_proj_b: Tensor
    dt_weight_b: Tensor
    dt_bias_b: Tensor
    A_b_log: Tensor
    D_b: Tensor
    out_proj: Tensor
    out_bias: Tensor | None


OPTIONAL_WEIGHTS = ("in_bias", "conv_bias", "conv_bias_b", "out_bias")


def bidirectional_block(
    hidden_states: Tensor,
    residual: Tensor | None,
    weights: BlockWeights,
    eps: float = 1e-5,
    merge: str = "mean",
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a layer of the model: residual addition, RMSNorm and the bidirectional mixer, in one op.

    For a backward pass the op keeps xz, x_dbl, the scans' entry states and the residual sum, and computes the norm and
    the convolutions again. Under autocast, products and activations have autocast's dtype.

    Args:
        hidden_states: (batch, len, d_model); float32, bfloat16, float16 or float64.
        residual: Like `hidden_states` in float32 (float64 for float64), or `None` in the first layer.
        weights: The layer's weights; nothing is copied or packed.
        eps: Added to the mean square in the norm.
        merge: "mean" or "sum" of the directions.
        backend: Name of a backend (see `available_backends`), or `None` for the fastest that applies.

    Returns:
        The mixer's output in the dtype of products, and hidden_states + residual in float32 (float64 for float64);
        (batch, len, d_model) each.

    Raises:
        ValueError: A shape or device disagrees with `hidden_states`, `len` is 0, or `merge` is unknown.
        TypeError: An argument is not a floating tensor.
        RuntimeError: The named backend cannot run here, or the memory of an argument was freed; the message says why.

    Source: Zhu et al. 2024, arXiv:2401.09417, Algorithm 1.
    """
    x = check_activation("hidden_states", hidden_states, "(batch, len, d_model)")
    check_length("hidden_states", x.shape[1])
    if residual is not None:
        check_operand("residual", residual, x.shape, "(batch, len, d_model)", x, "hidden_states")
        residual = residual.to(accumulate_dtype(x.dtype))
    check_choice("merge", merge, tuple(MERGES))
    _check_weights(weights, x)
    return run_bidirectional_block(x, residual, weights, eps, merge, backend)


def run_bidirectional_block(
    hidden_states: Tensor,
    residual: Tensor | None,
    weights: BlockWeights,
    eps: float,
    merge: str,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `bidirectional_block` on operands that are known to fit."""
    dtype = hidden_states.dtype
    if torch.is_autocast_enabled(hidden_states.device.type) and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
    run = resolve_backend("bidirectional_block", backend, hidden_states)
    every = checkpoint_interval(hidden_states, residual, *weights)
    return run(hidden_states, residual, *weights, dtype, eps, MERGES[merge], every)[:2]


def runs_block(hidden_states: Tensor, residual: Tensor | None) -> bool:
    """Return True if native kernels for `bidirectional_block` take such input, and no graph is recorded.

    The other backends run a layer part by part, so that autograd keeps and graphs show what they always have.
    """
    return bool(
        type(hidden_states) is Tensor
        and (residual is None or type(residual) is Tensor)
        and is_eager()
        and hidden_states.dim() == 3
        and hidden_states.shape[1] > 0
        and runs_by_default("bidirectional_block", "native", hidden_states)
    )


def _check_weights(weights: BlockWeights, x: Tensor) -> None:
    d_model = x.shape[2]
    d_inner = check_axes("weights.out_proj", weights.out_proj, "(d_model, d_inner)")[1]
    d_state = check_axes("weights.A_log", weights.A_log, "(d_inner, d_state)")[1]
    dt_rank = check_axes("weights.dt_weight", weights.dt_weight, "(d_inner, dt_rank)")[1]
    d_conv = check_axes("weights.conv_weight", weights.conv_weight, "(d_inner, 1, d_conv)")[2]
    channels = ((d_inner,), "(d_inner,)")
    direction = (
        ((d_inner, 1, d_conv), "(d_inner, 1, d_conv)"),
        channels,
        ((dt_rank + 2 * d_state, d_inner), "(dt_rank + 2 d_state, d_inner)"),
        ((d_inner, dt_rank), "(d_inner, dt_rank)"),
        channels,
        ((d_inner, d_state), "(d_inner, d_state)"),
        channels,
    )
    expected = (
        ((d_model,), "(d_model,)"),
        ((2 * d_inner, d_model), "(2 d_inner, d_model)"),
        ((2 * d_inner,), "(2 d_inner,)"),
        *direction,
        *direction,
        ((d_model, d_inner), "(d_model, d_inner)"),
        ((d_model,), "(d_model,)"),
    )
    for name, weight, (shape, axes_of) in zip(BlockWeights._fields, weights, expected, strict=True):
        if weight is not None or name not in OPTIONAL_WEIGHTS:
            check_operand(f"weights.{name}", weight, shape, axes_of, x, "hidden_states")
