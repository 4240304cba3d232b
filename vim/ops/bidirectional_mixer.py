"""The inner block of a bidirectional mixer: convolutions, projections and scans, with x_proj as a module.

A layer whose parts are all plain runs `bidirectional_block` instead, which keeps less for its backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from vim.ops.bidirectional_conv1d.interface import run_bidirectional_conv1d
from vim.ops.bidirectional_scan.interface import MERGES, ScanOperands, run_bidirectional_scan
from vim.ops.common.checks import check_choice, check_length
from vim.ops.common.layout import accumulate_dtype, as_dtype


class InnerWeights(NamedTuple):
    """Weights of one direction of the inner block.

    Attributes:
        conv_weight: (dim, width).
        conv_bias: (dim,) or `None`.
        x_proj: Module or function from (batch, len, dim) to (batch, len, dt_rank + 2 d_state).
        dt_weight: (dim, dt_rank).
        dt_bias: (dim,).
        A_log: (dim, d_state).
        D: (dim,).
    """

    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj: Callable[[Tensor], Tensor]
    dt_weight: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor


_NAMES = tuple(name for name in InnerWeights._fields if name != "x_proj")
_TENSORS = (*(f"forward.{name}" for name in _NAMES), *(f"backward.{name}" for name in _NAMES))


def bidirectional_mixer(
    x: Tensor,
    z: Tensor,
    forward: InnerWeights,
    backward: InnerWeights,
    merge: str = "mean",
    *,
    backend: str | None = None,
) -> Tensor:
    """Run the part of a bidirectional mixer between in_proj and out_proj.

    Args:
        x, z: Halves of in_proj's output, (batch, len, dim) each; any strides.
        forward, backward: Weights of the two directions.
        merge: "mean" or "sum" of the directions.
        backend: Name of a backend (see `available_backends`), or `None` for the fastest that applies.

    Returns:
        y, (batch, len, dim), in the dtype of `x`.

    Raises:
        ValueError: Sizes do not fit together; the message names both.
        RuntimeError: The named backend cannot run here, or the memory of an argument was freed; the message says why.

    Source: Zhu et al. 2024, arXiv:2401.09417, Algorithm 1, lines 5 to 20.
    """
    _check_sizes(x, z, forward, backward)
    check_choice("merge", merge, tuple(MERGES))
    # All at once, because `as_dtype` converts several tensors with one kernel.
    tensors = as_dtype(accumulate_dtype(x.dtype), _TENSORS, (*_tensors(forward), *_tensors(backward)))
    forward, backward = _with_tensors(forward, tensors[:6]), _with_tensors(backward, tensors[6:])
    u, u_b = run_bidirectional_conv1d(x, *forward[:2], *backward[:2], backend=backend)
    return run_bidirectional_scan(_scan_operands(u, forward), _scan_operands(u_b, backward), z, merge, backend)


def _tensors(weights: InnerWeights) -> tuple[Tensor | None, ...]:
    return (*weights[:2], *weights[3:])


def _with_tensors(weights: InnerWeights, tensors: list[Tensor | None]) -> InnerWeights:
    conv_weight, conv_bias, *others = tensors
    return InnerWeights(conv_weight, conv_bias, weights.x_proj, *others)  # type: ignore[arg-type]


def _scan_operands(u: Tensor, weights: InnerWeights) -> ScanOperands:
    x_dbl = weights.x_proj(u)
    width = weights.dt_weight.shape[1] + 2 * weights.A_log.shape[1]
    if x_dbl.shape[-1] != width:
        raise ValueError(f"x_proj must make dt_rank + 2 d_state = {width} numbers a token, got {x_dbl.shape[-1]}")
    x_dbl = x_dbl if x_dbl.dtype is u.dtype else x_dbl.to(u.dtype)
    return ScanOperands(u, x_dbl, weights.dt_weight, weights.dt_bias, weights.A_log, weights.D)


def _check_sizes(x: Tensor, z: Tensor, forward: InnerWeights, backward: InnerWeights) -> None:
    """Raise unless the sizes fit together. The checks are few, because every block of a model runs them."""
    check_length("x", x.shape[1])
    if z.shape != x.shape:
        raise ValueError(f"z must be like x, {tuple(x.shape)}, got {tuple(z.shape)}")
    dim = x.shape[2]
    states = (dim, forward.A_log.shape[1])
    rank = (dim, forward.dt_weight.shape[1])
    for side, w in (("forward", forward), ("backward", backward)):
        if not (w.conv_weight.shape[0] == w.dt_bias.shape[0] == w.D.shape[0] == dim) or w.dt_weight.shape != rank:
            shapes = {name: tuple(t.shape) for name, t in w._asdict().items() if isinstance(t, Tensor)}
            raise ValueError(f"{side} weights must be for dim = {dim} channels as x has, got {shapes}")
        if w.A_log.shape != states:
            raise ValueError(f"{side}.A_log must be (dim, d_state) = {states}, got {tuple(w.A_log.shape)}")
