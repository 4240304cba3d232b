"""Tests for modules whose weights a kernel may read instead of calling the module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class DefinedForwards:
    """What module classes are defined with, to notice a patched class or function: profilers patch them to count.

    Args:
        classes: The classes whose instances a kernel may replace.
        functions: Names of the functions of `torch.nn.functional` that their forwards call.
    """

    def __init__(self, classes: Sequence[type[nn.Module]], functions: Sequence[str]) -> None:
        names: list[tuple[Any, str]] = [(kind, name) for kind in classes for name in ("__call__", "forward")]
        names += [(nn.functional, name) for name in functions]
        self._defined = [(owner, name, getattr(owner, name)) for owner, name in names]

    def run(self) -> bool:
        """Return True if calls of these classes run the defined forwards and nothing else, such as a global hook."""
        return not torch_module._has_any_global_hook() and all(
            getattr(owner, name) is own for owner, name, own in self._defined
        )


def is_watched(module: nn.Module) -> bool:
    """Return True if calling the module does more than its class says: it has hooks, or its own forward or call."""
    own = module.__dict__  # called ten times per block, and faster than attribute access
    return bool(
        "forward" in own
        or own.get("_compiled_call_impl") is not None
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )


def is_causal_convolution(conv: Any, act: Any) -> bool:
    """Return True if `act(conv(x))` is the depthwise causal convolution and SiLU that the kernels compute."""
    return (
        type(conv) is nn.Conv1d
        and type(act) is nn.SiLU
        and not is_watched(conv)
        and not is_watched(act)
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.stride == conv.dilation == (1,)
        and conv.padding == (conv.kernel_size[0] - 1,)
        and conv.padding_mode == "zeros"
        and _has_plain_weights(conv, (conv.in_channels, 1, *conv.kernel_size), optional_bias=True)
    )


def is_projection(linear: Any, in_features: int, out_features: int) -> bool:
    """Return True if the module is a linear layer with a bias and these sizes, whose weights the kernels may read."""
    return (
        type(linear) is nn.Linear
        and not is_watched(linear)
        and _has_plain_weights(linear, (out_features, in_features), optional_bias=False)
    )


def is_patch_projection(conv: Any) -> bool:
    """Return True if the module is a convolution without padding whose weights the kernels may read."""
    return (
        type(conv) is nn.Conv2d
        and not is_watched(conv)
        and conv.groups == 1
        and conv.padding == (0, 0)
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and _has_plain_weights(conv, (conv.out_channels, conv.in_channels, *conv.kernel_size), optional_bias=True)
    )


def _has_plain_weights(module: nn.Module, shape: tuple[int, ...], optional_bias: bool) -> bool:
    parameters = module._parameters
    # A weight may also be an attribute or a buffer.
    if "weight" not in parameters or "bias" not in parameters:
        return False
    weight, bias = parameters["weight"], parameters["bias"]
    if weight is None or not _is_plain(weight) or weight.shape != shape:
        return False
    return optional_bias if bias is None else _is_plain(bias) and bias.shape == shape[:1]


def _is_plain(weight: Tensor) -> bool:
    if type(weight) is nn.Parameter or type(weight) is Tensor:
        return True
    # Of subclasses, those that stand for a tensor while a graph is recorded, and have no say in what functions do.
    quiet = type(weight).__torch_function__ is torch._C._disabled_torch_function_impl
    return quiet and not is_traceable_wrapper_subclass(weight)
