"""The inner block of a bidirectional mixer: convolutions, projections and scans, without saving the convolutions.

A training step would keep the convolution's output of both directions: it is the input of x_proj and of the scan.
It is cheap to compute again from x, which is kept anyway, so a saved-tensor hook replaces it by a promise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vim.ops import _backends
from vim.ops._checks import check_choice, check_length
from vim.ops._layout import accumulate_dtype, as_dtype
from vim.ops._transforms import is_transformed
from vim.ops.bidirectional_conv1d.interface import run_bidirectional_conv1d
from vim.ops.bidirectional_scan.interface import MERGES, ScanOperands, run_bidirectional_scan


class InnerWeights(NamedTuple):
    """What one direction of the inner block owns.

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


_OF_A_SIDE = tuple(name for name in InnerWeights._fields if name != "x_proj")
_TENSORS = (*(f"forward.{name}" for name in _OF_A_SIDE), *(f"backward.{name}" for name in _OF_A_SIDE))


def bidirectional_mixer(
    x: Tensor,
    z: Tensor,
    forward: InnerWeights,
    backward: InnerWeights,
    merge: str = "mean",
    *,
    backend: str | None = None,
) -> Tensor:
    """Run everything of a bidirectional mixer between in_proj and out_proj.

    In training x, z, the small projections and the scan's entry states are kept; the convolutions are recomputed.
    Under a caller's own saved-tensor hooks (activation checkpointing, offloading), under torch.func transforms and
    under torch.compile their machinery decides instead.

    Args:
        x, z: Halves of in_proj's output, (batch, len, dim) each; any strides.
        forward, backward: Weights of the two directions.
        merge: "mean" or "sum" of the directions.
        backend: Name of a backend (see `available_backends`), or `None` for the fastest that applies.

    Returns:
        y, (batch, len, dim), in the dtype of `x`.

    Raises:
        ValueError: Sizes do not belong together; the message names both.
        RuntimeError: The named backend cannot run here, or the memory of an argument was freed; the message says why.

    Source: Zhu et al. 2024, arXiv:2401.09417, Algorithm 1, lines 5 to 20.
    """
    _check_sizes(x, z, forward, backward)
    check_choice("merge", merge, tuple(MERGES))
    # All at once: see `as_dtype`.
    tensors = as_dtype(accumulate_dtype(x.dtype), _TENSORS, (*_tensors(forward), *_tensors(backward)))
    forward, backward = _with_tensors(forward, tensors[:6]), _with_tensors(backward, tensors[6:])
    conv_operands = (x, forward.conv_weight, forward.conv_bias, backward.conv_weight, backward.conv_bias)

    def convolve(*operands: Tensor | None) -> tuple[Tensor, ...]:
        return run_bidirectional_conv1d(*operands, backend=backend)  # type: ignore[arg-type]

    u, u_b = convolve(*conv_operands)
    with _recomputed((u, u_b), convolve, conv_operands):
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
    """Sizes must belong together. Few questions, because they are asked in every block of a model."""
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


def _recomputed(
    results: tuple[Tensor, ...],
    function: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor | None, ...],
) -> contextlib.AbstractContextManager[None]:
    """Save no tensor that shares memory with `results`; have `function(*inputs)` make it again when needed."""
    if torch.compiler.is_compiling() or is_transformed() or _backends.functions is not None:
        return contextlib.nullcontext()
    if not results[0].requires_grad or not _hooks_are_free():
        return contextlib.nullcontext()
    return _saved_as_promises(_Recomputation(results, function, inputs))


@contextlib.contextmanager
def _saved_as_promises(recomputation: _Recomputation) -> Iterator[None]:
    with torch.autograd.graph.saved_tensors_hooks(recomputation.pack, recomputation.unpack):
        yield


def _hooks_are_free() -> bool:
    # torch has no public question for this; only one pair of hooks is active at a time, and torch.func forbids any.
    autograd: Any = torch._C._autograd
    return autograd._saved_tensors_hooks_is_enabled() and autograd._top_saved_tensors_default_hooks(False) is None


class _Promise(NamedTuple):
    """A saved tensor as a view of a result that will be computed again."""

    result: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Recomputation:
    """Makes results again when the first promise is redeemed and drops them with the last."""

    def __init__(
        self,
        results: tuple[Tensor, ...],
        function: Callable[..., tuple[Tensor, ...]],
        inputs: tuple[Tensor | None, ...],
    ) -> None:
        self._memory = {result.untyped_storage().data_ptr(): i for i, result in enumerate(results)}
        self._dtype = results[0].dtype
        self._function = function
        self._inputs = tuple(t if t is None else t.detach() for t in inputs)
        self._versions = tuple(t if t is None else t._version for t in inputs)
        self._results: tuple[Tensor, ...] | None = None
        self._promised = 0
        self._redeemed = 0

    def pack(self, tensor: Tensor) -> Tensor | _Promise:
        result = self._memory.get(tensor.untyped_storage().data_ptr())
        if result is None or tensor.dtype != self._dtype or tensor.numel() == 0:
            return tensor
        self._promised += 1
        return _Promise(result, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, packed: Tensor | _Promise) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if self._results is None:
            self._results = self._recompute()
        tensor = self._results[packed.result].as_strided(packed.size, packed.stride, packed.offset)
        self._redeemed += 1
        if self._redeemed % self._promised == 0:
            self._results = None
        return tensor

    def _recompute(self) -> tuple[Tensor, ...]:
        for tensor, version in zip(self._inputs, self._versions, strict=True):
            if tensor is not None and tensor._version != version:
                raise RuntimeError(
                    "a tensor needed for the backward pass of bidirectional_mixer was changed in place after the "
                    f"forward pass: shape {tuple(tensor.shape)}, version {tensor._version}, expected {version}"
                )
        with torch.no_grad():
            return self._function(*self._inputs)
