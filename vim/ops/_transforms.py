"""Whether torch differentiates or maps what runs, in ways that registered ops and autograd.Functions do not support."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Inside a torch.func transform (grad, vmap, jvp, ...) or a level of forward-mode differentiation."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
