"""Helpers for modules that torch.fx and torch.export trace."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.fx import Proxy, Tracer

from vim.layers.watched import is_watched

_Forward = TypeVar("_Forward", bound=Callable[..., Any])


def is_symbolic(sizes: Iterable[object]) -> bool:
    """Return True if a size is a symbol, in an export for images of any size: comparing it would fix its value."""
    return any(isinstance(size, torch.SymInt) for size in sizes)


def fx_leaf(forward: _Forward) -> _Forward:
    """Decorate the `forward` of a module so that torch.fx records one call instead of tracing into it.

    Branches on shapes and dtypes cannot be traced by torch.fx. A custom tracer can declare modules as leaves;
    `torch.fx.symbolic_trace` and torchvision's feature extractor cannot.
    """

    @functools.wraps(forward)
    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for arg in (*args, *kwargs.values()):
            if isinstance(arg, Proxy):
                return _record(self, wrapped, cast(Tracer, arg.tracer), args, kwargs)
        return forward(self, *args, **kwargs)

    return cast(_Forward, wrapped)


def _record(
    module: nn.Module, forward: Callable[..., Any], tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Proxy:
    name = type(module).__name__
    if module is tracer.root:
        raise TypeError(f"torch.fx records {name} as one node: trace a module that holds it")
    if is_watched(module) or type(module).forward is not forward:
        # Hooks run while the module is traced, and would run again with the recorded call.
        raise TypeError(f"torch.fx cannot trace {name} with a hook or another forward: take it off, or name it a leaf")
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)
