"""Matrix products around the ops: oneDNN's where PyTorch's default is slower.

PyTorch's float32 `F.linear` runs on MKL, which leaves the widest vector units of other makers' processors idle: 106
against 231 GFLOP/s on one Zen 5 core. oneDNN, which comes with the same PyTorch, reads the same weights. They need not
be packed beforehand (packed ones gain 2 %), so nothing is cached and nothing can be out of date.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vim.ops._checks import needs_grad

_switched_on = os.environ.get("VIM_ONEDNN_LINEAR", "1") != "0"
_onednn_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by the fastest library at hand, forward and backward.

    Compiled, exported and transformed (torch.func) graphs, autocast regions and tensor subclasses keep `F.linear`.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or `None`.

    Returns:
        (..., out_features).
    """
    if not _onednn_applies(x, weight):
        return F.linear(x, weight, bias)
    if needs_grad(x, weight, bias):
        return _OneDNNLinear.apply(x, weight, bias)
    return _onednn_linear(x, weight, bias, "none", [], "")


@contextlib.contextmanager
def onednn_linear(enabled: bool) -> Iterator[None]:
    """Switch oneDNN's products on or off, for this process, inside a `with` block."""
    global _switched_on
    before, _switched_on = _switched_on, enabled
    try:
        yield
    finally:
        _switched_on = before


def onednn_reason() -> str | None:
    """Why float32 products on the CPU do not go through oneDNN; `None` where they do."""
    if not _switched_on:
        return "switched off, by VIM_ONEDNN_LINEAR=0 or vim.ops.onednn_linear(False)"
    if _onednn_linear is None or not torch.backends.mkldnn.is_available():
        return "this build of PyTorch has no oneDNN linear"
    if not torch.backends.mkldnn.enabled:
        return "torch.backends.mkldnn.enabled is False"
    return None


def _onednn_applies(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and type(weight) in (Tensor, torch.nn.Parameter)
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() > 0
        and onednn_reason() is None
        and not torch.is_autocast_enabled("cpu")
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.jit.is_tracing()
    )


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn_linear(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = dy.flatten(0, -2)
        dx = linear(dy, weight.t()) if needs_x else None
        dweight = linear(rows.t(), x.flatten(0, -2).t()) if needs_weight else None
        return dx, dweight, rows.sum(0) if needs_bias else None


def _flops(x: Any, weight: Any, *others: Any, out_shape: Any = None, **settings: Any) -> int:
    rows = 1
    for size in x[:-1]:
        rows *= size
    return 2 * rows * weight[0] * weight[1]


if _onednn_linear is not None:
    register_flop_formula(_onednn_linear)(_flops)
