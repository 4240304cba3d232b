"""Matrix products around the ops: oneDNN's where PyTorch's default is slower, and rows that kernels load at once.

PyTorch's float32 `F.linear` runs on MKL, which leaves the widest vector units of other makers' processors idle: 106
against 231 GFLOP/s on one Zen 5 core. oneDNN, which comes with the same PyTorch, reads the same weights as they are;
in inference it gets them packed, in bfloat16 too (see `_packed_weights`), which brings up to a fifth with two threads.

On a processor without instructions for a half precision, PyTorch multiplies it with 4 to 10 GFLOP/s on a Zen 3 core
that does 84 in float32. Such products go through float32: they are exact there, summed as in float32, and
rounded once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.flop_counter import register_flop_formula

from vim.ops._checks import check_memory, needs_grad
from vim.ops._packed_weights import multiplies_in, packed_weight

_switched_on = os.environ.get("VIM_ONEDNN_LINEAR", "1") != "0"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_onednn_linear: Any = torch.ops.mkldnn._linear_pointwise.default if _HAS_ONEDNN else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by the fastest library at hand, forward and backward.

    Compiled, exported and transformed (torch.func) graphs, autocast regions and tensor subclasses keep `F.linear`.
    On a GPU in half precision the rows of the result start at multiples of 16 bytes; those between are not part of it.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or `None`.

    Returns:
        (..., out_features).

    Raises:
        RuntimeError: On oneDNN's way, the memory of an argument was freed or cut short.
    """
    if not goes_to_onednn(x, weight):
        return _linear_on_gpu(x, weight, bias) if x.is_cuda else F.linear(x, weight, bias)
    check_memory("x", x)
    if bias is not None:
        check_memory("bias", bias)
    if needs_grad(x, weight, bias):
        check_memory("weight", weight)
        return _linear_with_grad(x, weight, bias)
    packed = packed_weight(weight)
    if not multiplies_in(x.dtype):
        weight = weight.float() if packed is None else packed
        return _onednn_linear(x.float(), weight, _float(bias), "none", [], "").to(x.dtype)
    return _onednn_linear(x, weight if packed is None else packed, bias, "none", [], "")


@contextlib.contextmanager
def onednn_linear(enabled: bool) -> Iterator[None]:
    """Switch oneDNN's products on or off, for this process, inside a `with` block."""
    global _switched_on
    before, _switched_on = _switched_on, enabled
    try:
        yield
    finally:
        _switched_on = before


def goes_through_float32(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of these two is faster in float32: half precision on a processor that does not multiply in it.

    Where oneDNN is not used (see `linear`), PyTorch's own products are left as they are.
    """
    return goes_to_onednn(x, weight) and not multiplies_in(x.dtype)


def onednn_reason() -> str | None:
    """Why float32 products on the CPU do not go through oneDNN; `None` where they do."""
    if not _switched_on:
        return "switched off, by VIM_ONEDNN_LINEAR=0 or vim.ops.onednn_linear(False)"
    if not _HAS_ONEDNN:
        return "this build of PyTorch has no oneDNN linear"
    if not torch.backends.mkldnn.enabled:
        return "torch.backends.mkldnn.enabled is False"
    return None


def goes_to_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of these two is oneDNN's here and now."""
    # The cheap questions first: this is asked four times a block.
    return bool(
        type(x) is Tensor
        and (type(weight) is Parameter or type(weight) is Tensor)
        and x.dtype in _DTYPES
        and weight.dtype is x.dtype
        and x.is_cpu
        and weight.is_cpu
        and _switched_on
        and _HAS_ONEDNN
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def _linear_with_grad(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype is torch.float32:
        return _OneDNNLinear.apply(x, weight, bias)
    if multiplies_in(x.dtype):
        return F.linear(x, weight, bias)  # oneDNN's already
    return _OneDNNLinear.apply(x.float(), weight.float(), _float(bias)).to(x.dtype)


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn_linear(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return _linear_backward(ctx, dy)


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias of a function that has saved the first two."""
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    rows = dy.flatten(0, -2)
    dx = linear(dy, weight.t()) if needs_x else None
    dweight = linear(rows.t(), x.flatten(0, -2).t()) if needs_weight else None
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
        and torch._C._functorch.peek_interpreter_stack() is None
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
        return (*_linear_backward(ctx, dy), None)


def _flops(x: Any, weight: Any, *others: Any, out_shape: Any = None, **settings: Any) -> int:
    rows = 1
    for size in x[:-1]:
        rows *= size
    return 2 * rows * weight[0] * weight[1]


if _HAS_ONEDNN:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)
