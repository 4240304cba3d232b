"""Whether a kernel may read a module's weights in place of calling it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_watched(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class says: a hook of its own, or another forward or call."""
    own = module.__dict__  # asked ten times a block: attributes take longer
    return bool(
        "forward" in own
        or own.get("_compiled_call_impl") is not None
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )


def is_readable(module: Any) -> bool:
    """Whether the module is a plain linear layer or convolution with plain weights that nobody watches."""
    if type(module) not in (nn.Linear, nn.Conv1d) or is_watched(module):
        return False
    # One that is not among the parameters may be an attribute or a buffer.
    if "weight" not in module._parameters or "bias" not in module._parameters:
        return False
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    if weight is None or (bias is None and type(module) is nn.Linear):
        return False
    return type(weight) is nn.Parameter or not is_traceable_wrapper_subclass(weight)
