"""State of torch around a call: recording, transforms and gradients."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Return True inside a torch.func transform (grad, vmap, jvp, ...) or a level of forward-mode differentiation."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_eager() -> bool:
    """Return True where ops run now and as they are: no graph is recorded and no function is transformed."""
    return bool(not torch.compiler.is_compiling() and not is_transformed() and torch._C._get_tracing_state() is None)


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Return True if autograd will record an op on these tensors."""
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors)
