"""Modes of a model for the time of an explanation; it is left as it was.

Modes, gradients and hooks belong to the model, which threads share: explanations wait for each other.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each of its modules back into the mode it was in.

    One thread at a time is inside, so that none of them takes a mode for the user's that another thread has set.
    """
    with _one_at_a_time:
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Keep gradients away from a model's parameters."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def of_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that ignores calls of its module in other threads, which may predict meanwhile."""
    own = threading.get_ident()

    def run(*arguments: Any) -> Any:
        return hook(*arguments) if threading.get_ident() == own else None

    return run
