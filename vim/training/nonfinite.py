"""Steps with an infinite or undefined loss or gradient: find the first bad tensor, and keep it out of checkpoints."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

ADVICE = "the last checkpoint is older: try a lower optim.lr, optim.clip_grad or another precision"


class NonFiniteError(RuntimeError):
    """The loss or its gradient was infinite or not a number; the message names the step and the first bad tensor."""


@dataclass(frozen=True, slots=True)
class BadTensor:
    """A tensor that is not finite."""

    kind: Literal["parameter", "input", "activation", "gradient"]
    name: str
    """Name of the parameter or module, or words for an input."""

    def __str__(self) -> str:
        return f"the {self.kind} {self.name}"


def bad_parameter(model: nn.Module) -> BadTensor | None:
    """Return the first parameter that is not finite; `None` if all are."""
    names = (name for name, parameter in model.named_parameters() if not _finite(parameter))
    name = next(names, None)
    return None if name is None else BadTensor("parameter", name)


def check_weights_finite(model: nn.Module, step: int) -> None:
    """Raise if a parameter is not finite, to keep it out of the checkpoints.

    Args:
        model: The model.
        step: Optimizer steps done, for the message.

    Raises:
        NonFiniteError: A parameter is infinite or not a number; the message names it.
    """
    bad = bad_parameter(model)
    if bad is not None:
        raise NonFiniteError(f"{bad} is not finite after step {step}, and {ADVICE}")


class SuspectBatch:
    """The micro-batch of a step to examine when the step fails: the first with a bad loss, else the last.

    Args:
        device: Where the images are.
    """

    def __init__(self, device: torch.device) -> None:
        self.images = torch.empty(0, device=device)
        """(batch, in_chans, height, width)."""
        self._bad = torch.zeros((), dtype=torch.bool, device=device)

    def add(self, images: Tensor, loss: Tensor) -> None:
        """Take the next micro-batch into account, without synchronising with the device."""
        if len(self.images):
            images = torch.where(self._bad, self.images, images)
        self.images = images
        self._bad = self._bad | ~loss.detach().isfinite()


def first_bad_tensor(model: nn.Module, images: Tensor, autocast: Any) -> BadTensor | None:
    """Name the first tensor of a step that is not finite: a parameter, the input, an activation or a gradient.

    Args:
        model: The model, with the gradients of the step; it is run once more.
        images: The input, (batch, in_chans, height, width).
        autocast: Makes the context to run the model in.

    Returns:
        The tensor; `None` if all are finite now.
    """
    parameter = bad_parameter(model)
    if parameter is not None:
        return parameter
    if not _finite(images):
        bad = int((~images.isfinite().flatten(1).all(dim=1)).nonzero()[0])
        return BadTensor("input", f"(image {bad} of the micro-batch)")
    with torch.no_grad(), autocast(), _watch(model) as bad_modules:
        model(images)
    if bad_modules:
        return BadTensor("activation", f"of {bad_modules[0]}")
    # The backward pass goes from the last parameter to the first.
    for name, weight in reversed(list(model.named_parameters())):
        if weight.grad is not None and not _finite(weight.grad):
            return BadTensor("gradient", f"of {name}")
    return None


def describe_nonfinite(loss: float, grad_norm: float) -> str:
    """Return which of the two is not finite, in words."""
    return f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {grad_norm}"


@contextmanager
def _watch(model: nn.Module) -> Iterator[list[str]]:
    """Collect the names of modules whose output is not finite, in the order of their calls' ends: innermost first."""
    bad: list[str] = []

    def hook(name: str) -> Any:
        def check(module: nn.Module, inputs: Any, output: Any) -> None:
            if any(not _finite(tensor) for tensor in _tensors(output)):
                bad.append(name)

        return check

    handles = [module.register_forward_hook(hook(name or "the model")) for name, module in model.named_modules()]
    try:
        yield bad
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from _tensors(item)


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
