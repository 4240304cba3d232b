"""Whole layers of the model in one call, for inference on the CPU: the ops without the Python between them.

Weights in float32 are read as they are. Copies of the others (those of products packed, the rest in float32) are made
once and used while they are those of the same tensors: memory, sizes, dtype, version and fingerprint.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from vim.ops import _native
from vim.ops._backends import resolve_backend
from vim.ops._checks import check_choice, check_memory
from vim.ops._fingerprint import Origin
from vim.ops._packed_weights import multiplies_in, packed_weight
from vim.ops.bidirectional_scan.interface import MERGES
from vim.ops.linear import goes_fast


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
_OPTIONAL = {"in_bias", "conv_bias", "conv_bias_b", "out_bias"}
_dtype = attrgetter("dtype")


class PreparedBlock:
    """Copies of those of a layer's weights that the call does not read as they are. It keeps no weight's memory alive.

    Args:
        weights: Those of the layer.

    Raises:
        RuntimeError: The memory of a weight was freed or cut short; the message has its name.
    """

    def __init__(self, weights: BlockWeights) -> None:
        self._identities = [*map(id, weights)]
        self._types = [*map(type, weights)]
        self._unfit: BlockWeights | None = weights
        if not (_is_complete(weights) and _fit_together(weights) and all(t is None or _is_plain(t) for t in weights)):
            return
        names = BlockWeights._fields
        for name, t in zip(names, weights, strict=True):
            check_memory(name, t)
        self._is_copied = [t is not None and not _reads_as_it_is(n, t) for n, t in zip(names, weights, strict=True)]
        self._is_read = [t is not None and not copied for t, copied in zip(weights, self._is_copied, strict=True)]
        self._read_dtypes = [*map(_dtype, _select(weights, self._is_read))]
        # Place among the weights, and copy.
        self._copies: list[tuple[int, Tensor]] = []
        # Taken first: a change while the copies are made is found at the next call.
        self._origin = Origin(_select(weights, self._is_copied), self._copies.clear)
        copies = [(i, _copy(names[i], t)) for i, t in enumerate(weights) if t is not None and self._is_copied[i]]
        if all(copy is not None for _, copy in copies):
            self._copies += copies  # type: ignore[arg-type]
            self._unfit = None

    def operands(self, weights: BlockWeights) -> list[Tensor | None] | None:
        """What the call takes for these weights, in their order.

        Nothing (an empty list) where they cannot be run in one call; `None` where the copies are not of these weights,
        or of values that they no longer have. Of weights that are read as they are, the call itself checks the sizes.
        """
        if [*map(id, weights)] != self._identities or [*map(type, weights)] != self._types:
            return None
        if self._unfit is not None:
            return []
        copies = self._copies[:]  # another thread may drop them
        copied = _select(weights, self._is_copied)
        if not (
            copies
            and [*map(_dtype, _select(weights, self._is_read))] == self._read_dtypes
            and all(map(Tensor.is_contiguous, copied))
            and self._origin.is_still(copied)
        ):
            return None
        operands: list[Tensor | None] = [*weights]
        for i, copy in copies:
            operands[i] = copy
        return operands


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


def _select(weights: BlockWeights, which: list[bool]) -> list[Tensor]:
    """Of those that are there."""
    return [*compress(weights, which)]  # type: ignore[list-item]


def _reads_as_it_is(name: str, t: Tensor) -> bool:
    if name in _PRODUCT_BIASES:
        return multiplies_in(t.dtype)
    return name not in _PRODUCTS and t.dtype is torch.float32


def _copy(name: str, t: Tensor) -> Tensor | None:
    return packed_weight(t) if name in _PRODUCTS else t.detach().float()


def block_runs_at_once(x: Tensor, residual: Tensor | None, weights: BlockWeights) -> bool:
    """Whether inference on this input may be one call, as far as the input and the state of torch decide."""
    return bool(
        not torch.is_grad_enabled()
        and goes_fast(x, weights.in_proj)
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


class ReadyBlock(NamedTuple):
    """A layer that is one call as long as nobody touches its weights.

    Attributes:
        operands: What a `PreparedBlock` makes of its weights.
        eps: Of its norm.
        merge: "mean" or "sum" of its directions.
    """

    operands: list[Tensor | None]
    eps: float
    merge: str


def bidirectional_blocks(x: Tensor, residual: Tensor | None, blocks: Sequence[ReadyBlock]) -> tuple[Tensor, Tensor]:
    """Residual addition, RMSNorm and bidirectional mixer of one layer after the other, without gradients.

    Args:
        x: (batch, len, d_model), for which `block_runs_at_once`.
        residual: Like `x` in float32, or `None`.
        blocks: At least one.

    Returns:
        The last mixer's output in the dtype of `x`, and the last sum in float32.

    Raises:
        ValueError: A block's `merge` is neither.
        RuntimeError: The memory of an argument was freed or cut short; the message names it.

    Source: Zhu et al. 2024, arXiv:2401.09417, Algorithm 1.
    """
    for block in blocks:
        check_choice("merge", block.merge, tuple(MERGES))
    operands = [t for block in blocks for t in block.operands]
    eps, scales = [block.eps for block in blocks], [MERGES[block.merge] for block in blocks]
    return torch.ops.vim.bidirectional_blocks_inference.default(x, residual, operands, eps, scales)
