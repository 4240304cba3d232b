"""Matrix products around the ops: the fastest at hand, and rows that kernels load at once.

In inference weights are packed once (see `_packed_weights`): for kernels of our own in float32, for oneDNN in a half
precision that the processor multiplies in. On a Zen 3 core the former do 90 GFLOP/s of 98; PyTorch's `F.linear`, which
is MKL's, does 84 and less for few columns, oneDNN 75, and 25 us more before it starts.

In training weights change at every step. With AVX2 PyTorch's float32 `F.linear` is the fastest there (on a Zen 3 core
77 GFLOP/s forward and backward, oneDNN 65), but MKL leaves the widest vector units of other makers' processors idle
(on a Zen 5 core 106 GFLOP/s, oneDNN 231). So products are oneDNN's with AVX-512.

On a processor without instructions for a half precision, PyTorch multiplies it with 4 to 10 GFLOP/s on a Zen 3 core.
Such products go through float32: they are exact there, summed as in float32, and rounded once.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.flop_counter import register_flop_formula

from vim.ops._checks import check_memory, needs_grad
from vim.ops._packed_weights import multiplies_in, packed_weight
from vim.ops._transforms import is_transformed

torch.library.define("vim::packed_linear", "(Tensor x, Tensor packed, Tensor? bias, int columns) -> Tensor")

_switched_on = os.environ.get("VIM_FAST_LINEAR", "1") != "0"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_onednn_linear: Any = torch.ops.mkldnn._linear_pointwise.default if _HAS_ONEDNN else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by the fastest library at hand, forward and backward.

    Compiled, exported and transformed (torch.func) graphs, autocast regions, tensor subclasses and operands that do not
    fit together are left to `F.linear`.
    On a GPU in half precision the rows of the result start at multiples of 16 bytes; those between are not part of it.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or `None`.

    Returns:
        (..., out_features).

    Raises:
        RuntimeError: The memory of an argument was freed or cut short, where the product is not left to `F.linear`.
    """
    if not (goes_fast(x, weight) and _fit_together(x, weight, bias)):
        return _linear_on_gpu(x, weight, bias) if x.is_cuda else F.linear(x, weight, bias)
    check_memory("x", x)
    if bias is not None:
        check_memory("bias", bias)
    if needs_grad(x, weight, bias):
        check_memory("weight", weight)
        return _linear_once(x, weight, bias)
    packed = packed_weight(weight)
    if packed is None:
        return _linear_once(x, weight, bias)
    if packed.is_mkldnn:
        return _onednn_linear(x, packed, bias, "none", [], "")
    return _packed_linear(x, packed, bias, weight.shape[0])


@contextlib.contextmanager
def fast_linear(enabled: bool) -> Iterator[None]:
    """Leave products on the CPU to PyTorch's `F.linear`, or not, for this process, inside a `with` block."""
    global _switched_on
    before, _switched_on = _switched_on, enabled
    try:
        yield
    finally:
        _switched_on = before


def goes_through_float32(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of these two is faster in float32: half precision on a processor that does not multiply in it.

    What is left to `F.linear` (see `linear`) stays as it is.
    """
    return goes_fast(x, weight) and not multiplies_in(x.dtype)


def default_linear_reason() -> str | None:
    """Why products on the CPU are left to PyTorch's `F.linear`; `None` where they are not."""
    if not _switched_on:
        return "switched off, by VIM_FAST_LINEAR=0 or vim.ops.fast_linear(False)"
    if not _HAS_ONEDNN:
        return "this build of PyTorch has no oneDNN linear"
    if not torch.backends.mkldnn.enabled:
        return "torch.backends.mkldnn.enabled is False"
    return None


def goes_fast(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of these two is not left to `F.linear` here and now."""
    # The cheap questions first: this is asked four times a block.
    return bool(
        type(x) is Tensor
        and (type(weight) is Parameter or type(weight) is Tensor)
        and x.dtype in _DTYPES
        and weight.dtype is x.dtype
        and x.is_cpu
        and weight.is_cpu
        and x.layout is torch.strided
        and weight.layout is torch.strided
        and _switched_on
        and _HAS_ONEDNN
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and not is_transformed()
        and torch._C._get_tracing_state() is None
    )


def _fit_together(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether they are what `linear` says. Of others `F.linear` takes some, and has better words for the rest."""
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        return False
    return bias is None or (bias.dtype is x.dtype and bias.shape == weight.shape[:1])


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN beats PyTorch's float32 product, which is MKL's, with a weight that is not packed."""
    return _HAS_ONEDNN and "AVX512" in torch.backends.cpu.get_cpu_capability()


def _packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, columns: int) -> Tensor:
    return torch.ops.vim.packed_linear.default(x, packed, _float(bias), columns)


def _linear_once(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """With a weight that is not packed, for operands that `goes_fast`; differentiable."""
    if x.dtype is not torch.float32:
        if multiplies_in(x.dtype):
            return F.linear(x, weight, bias)  # oneDNN's already
        return _linear_once(x.float(), weight.float(), _float(bias)).to(x.dtype)
    return _OneDNNLinear.apply(x, weight, bias) if onednn_is_faster() else F.linear(x, weight, bias)


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn_linear(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return _linear_backward(ctx, dy, _linear_once)


def _linear_backward(
    ctx: Any, dy: Tensor, product: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias of a function that has saved the first two."""
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    count = x.numel() // x.shape[-1]
    rows = dy.reshape(count, weight.shape[0])
    dx = product(dy, weight.t()) if needs_x else None
    dweight = product(rows.t(), x.reshape(count, -1).t()) if needs_weight else None
    return dx, dweight, rows.sum(0) if needs_bias else None


# ---- on a GPU ------------------------------------------------------------------------------------------------------

# Bytes that a thread loads at once.
_ALIGNMENT = 16


def _linear_on_gpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    columns = weight.shape[0]
    aligned = -(-columns * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT // dtype.itemsize
    if aligned == columns or dtype.itemsize != 2 or x.dtype is torch.float64 or not _is_plain(x, weight):
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling():  # the compiler merges the padding with the weight's cast, or folds it away
        padding = (0, aligned - columns)
        wide = F.linear(x, F.pad(weight, (0, 0, *padding)), None if bias is None else F.pad(bias, padding))
        return wide[..., :columns]
    operands = [t if t is None or t.dtype is dtype else t.to(dtype) for t in (x, weight, bias)]
    return _AlignedLinear.apply(*operands, aligned)


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    return bool(
        not is_traceable_wrapper_subclass(x)
        and not is_traceable_wrapper_subclass(weight)
        and x.dim() > 1
        and x.numel() > 0
        and not torch.compiler.is_exporting()
        and not is_transformed()
        and torch._C._get_tracing_state() is None
    )


class _AlignedLinear(torch.autograd.Function):
    """`F.linear` with rows `aligned` numbers apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, aligned: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        out = x.new_empty(*x.shape[:-1], aligned)[..., : weight.shape[0]]
        rows, target = x.flatten(0, -2), out.flatten(0, -2)
        if bias is None:
            torch.mm(rows, weight.t(), out=target)
        else:
            torch.addmm(bias, rows, weight.t(), out=target)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return (*_linear_backward(ctx, dy, linear), None)


@register_flop_formula(torch.ops.vim.packed_linear)
def _packed_flops(x: Any, packed: Any, bias: Any, columns: int, *, out_shape: Any = None, **settings: Any) -> int:
    return 2 * math.prod(x) * columns


def _flops(x: Any, weight: Any, *others: Any, out_shape: Any = None, **settings: Any) -> int:
    return 2 * math.prod(x) * int(weight[0])


if _HAS_ONEDNN:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)
