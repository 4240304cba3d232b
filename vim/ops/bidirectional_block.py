"""A whole layer of the model in one call, for inference on the CPU: the ops without the Python between them.

What the call reads of the weights (products in oneDNN's layout, the others in float32) is made once and used while
every weight is the same tensor, at the same place, with the same sizes, dtype, version and fingerprint.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from vim.ops import _native
from vim.ops._backends import resolve_backend
from vim.ops._checks import check_choice
from vim.ops._fingerprint import Fingerprint, announced
from vim.ops._packed_weights import multiplies_in, packed_weight
from vim.ops.bidirectional_scan.interface import MERGES
from vim.ops.linear import goes_to_onednn


class BlockWeights(NamedTuple):
    """Weights of a norm and a bidirectional mixer; `_b` is the backward direction.

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


_PRODUCTS = ("in_proj", "x_proj", "x_proj_b", "out_proj")
_PRODUCT_BIASES = ("in_bias", "out_bias")
_CONVOLUTIONS = ("conv_weight", "conv_weight_b")
_OPTIONAL = {"in_bias", "conv_bias", "conv_bias_b", "out_bias"}


class PreparedBlock:
    """A layer's weights as the call reads them.

    Attributes:
        operands: In the order of `BlockWeights`; `None` where these weights cannot be run in one call.
    """

    def __init__(self, weights: BlockWeights) -> None:
        self._weights = weights
        self._present = [t for t in weights if t is not None]
        self.operands: tuple[Tensor | None, ...] | None = None
        if _is_complete(weights) and _fit_together(weights) and all(map(_is_plain, self._present)):
            self._announced = announced(self._present)
            # Taken first: a change while the operands are made is found at the next call.
            copied = [t for t in self._present if t.dtype is not torch.float32] + [
                getattr(weights, n) for n in _PRODUCTS
            ]
            self._fingerprint = Fingerprint(copied)
            self._taken = self._fingerprint.take()
            operands = tuple(_operands(weights))
            if not any(t is None for t, weight in zip(operands, weights, strict=True) if weight is not None):
                self.operands = operands

    def is_of(self, weights: BlockWeights) -> bool:
        """Whether these are still the weights, with the values they had."""
        if not all(map(is_, weights, self._weights)):
            return False
        return self.operands is None or (
            announced(self._present) == self._announced
            and all(map(Tensor.is_contiguous, self._present))
            and self._fingerprint.take() == self._taken
        )


def _is_complete(weights: BlockWeights) -> bool:
    """Whether what must be there is, the products all of one dtype."""
    there = {name: t.dtype for name, t in weights._asdict().items() if t is not None}
    products = {dtype for name, dtype in there.items() if name in _PRODUCTS + _PRODUCT_BIASES}
    return len(products) == 1 and there.keys() >= weights._asdict().keys() - _OPTIONAL


def _fit_together(weights: BlockWeights) -> bool:
    """Whether they have the sizes that `BlockWeights` says. For others the modules have better words."""
    if weights.out_proj.dim() != 2:
        return False
    d_model, d_inner = weights.out_proj.shape
    taps, rank, states = (t.shape[-1:] for t in (weights.conv_weight, weights.dt_weight, weights.A_log))
    x_proj = (sum(rank) + 2 * sum(states), d_inner)
    channels = (d_inner,)
    direction = ((d_inner, 1, *taps), channels, x_proj, (d_inner, *rank), channels, (d_inner, *states), channels)
    in_proj, out_proj = ((2 * d_inner, d_model), (2 * d_inner,)), ((d_model, d_inner), (d_model,))
    sizes = ((d_model,), *in_proj, *direction, *direction, *out_proj)
    return all(t is None or (t.shape == size and t.numel() > 0) for t, size in zip(weights, sizes, strict=True))


def _is_plain(t: Tensor) -> bool:
    return (type(t) is Parameter or type(t) is Tensor) and t.is_cpu and t.is_contiguous() and not t.is_inference()


def _operands(weights: BlockWeights) -> Iterator[Tensor | None]:
    for name, t in weights._asdict().items():
        if t is None:
            yield None
        elif name in _PRODUCTS:
            yield packed_weight(t)
        elif name in _PRODUCT_BIASES:
            yield t.detach() if multiplies_in(t.dtype) else t.detach().float()
        else:
            yield t.detach().float().flatten(1) if name in _CONVOLUTIONS else t.detach().float()


def block_runs_at_once(x: Tensor, residual: Tensor | None, weights: BlockWeights) -> bool:
    """Whether inference on this input may be one call, as far as the input and the state of torch decide."""
    return bool(
        not torch.is_grad_enabled()
        and goes_to_onednn(x, weights.in_proj)
        and x.dim() == 3
        and x.shape[2] == weights.in_proj.shape[-1]
        and (residual is None or _is_residual(residual, x))
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and _runs_native(x)
    )


def _is_residual(residual: Tensor, x: Tensor) -> bool:
    fits = residual.is_cpu and residual.dtype is torch.float32 and residual.shape == x.shape
    return fits and type(residual) is Tensor


def _runs_native(x: Tensor) -> bool:
    portable = resolve_backend("bidirectional_scan", None, x) is torch.ops.vim.bidirectional_scan.default
    return portable and _native.cpu.path is not None


def bidirectional_block(
    x: Tensor, residual: Tensor | None, prepared: PreparedBlock, eps: float, merge: str
) -> tuple[Tensor, Tensor]:
    """Residual addition, RMSNorm and bidirectional mixer, without gradients.

    Args:
        x: (batch, len, d_model), for which `block_runs_at_once`.
        residual: Like `x` in float32, or `None`.
        prepared: Weights whose `operands` are not `None`.
        eps: Of the norm.
        merge: "mean" or "sum" of the directions.

    Returns:
        The mixer's output in the dtype of `x`, and the sum in float32.

    Raises:
        ValueError: `merge` is neither.

    Source: Zhu et al. 2024, arXiv:2401.09417, Algorithm 1.
    """
    assert prepared.operands is not None
    check_choice("merge", merge, tuple(MERGES))
    return torch.ops.vim.bidirectional_block_inference.default(x, residual, *prepared.operands, eps, MERGES[merge])
