"""A model's inference as one CUDA graph: the host launches the graph instead of hundreds of kernels."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from vim.runtime.gpu import captured


class Graphed:
    """A function of one tensor whose kernels are replayed on fixed memory; `graphed` makes it.

    Args:
        x: The input that the kernels read.
        output: What they write: a tensor, or tensors in tuples, lists and dicts.
        replay: Runs the kernels.
    """

    def __init__(self, x: Tensor, output: Any, replay: Callable[[], object]) -> None:
        self._x, self._output, self._replay = x, output, replay

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Any:
        """Return the model's output for `x`, in new tensors.

        Raises:
            ValueError: `x` has another shape, dtype or device than the example.
        """
        got, wanted = ((tuple(t.shape), t.dtype, t.device) for t in (x, self._x))
        if got != wanted:
            raise ValueError(f"x must be like the example, {_words(wanted)}; got {_words(got)}")
        self._x.copy_(x)
        self._replay()
        return tree_map_only(Tensor, torch.clone, self._output)


def graphed(model: nn.Module, example: Tensor) -> Graphed:
    """Capture a model's inference as a CUDA graph, and return a function that replays it.

    Worth it where the host takes longer than the kernels: for small batches, above all for one image. The function
    takes tensors like `example` and returns what `model` returns, without gradients. Changes of weights in place, such
    as `load_state_dict`, take effect; after any other change of the model, capture again. The function is for one
    thread.

    Args:
        model: The model, in evaluation mode, on a GPU. Its forward pass must not wait for the GPU.
        example: An input, (batch, channels, height, width) for images, on the same GPU. Its values do not matter.

    Raises:
        ValueError: The example or the model is not on one GPU, or the model is in training mode.
        RuntimeError: The model does something that a graph cannot hold, such as `.item()`; the message is CUDA's.
    """
    if example.device.type != "cuda":
        raise ValueError(f"example must be on a GPU, got {example.device}; without one, call the model itself")
    elsewhere = {str(t.device) for t in chain(model.parameters(), model.buffers()) if t.device != example.device}
    if elsewhere:
        raise ValueError(f"model must be on the example's device, {example.device}; got {', '.join(sorted(elsewhere))}")
    if model.training:
        raise ValueError("model must be in evaluation mode; call model.eval() first")
    outputs: list[Any] = []
    with torch.cuda.device(example.device), torch.no_grad():
        x = example.detach().clone()
        replay = captured([lambda: outputs.append(model(x))], torch.cuda.Stream())
    # The first output is of the call before the capture.
    return Graphed(x, outputs[-1], replay)


def _words(of: tuple[Any, ...]) -> str:
    shape, dtype, device = of
    return f"{shape} {str(dtype).removeprefix('torch.')} on {device}"
