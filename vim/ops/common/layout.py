"""Memory layout and precision that all backends share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from vim.ops.common.checks import check_memory
from vim.ops.common.eager import is_transformed, needs_grad

# Tokens between two saved states: a chunk. The backward pass rebuilds the states of one chunk at a time.
CHECKPOINT_EVERY = 64


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of states, decays, softplus, weights and sums: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_dtype(
    dtype: torch.dtype, names: Sequence[str], tensors: Iterable[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """Return the tensors in this dtype; a tensor that has it already, and `None`, are passed on.

    On a GPU without gradients one kernel converts them all, because launches take longer than these conversions.

    Args:
        dtype: The dtype to convert to.
        names: Names of the tensors for errors.
        tensors: As many tensors or `None`.

    Raises:
        RuntimeError: The memory of a tensor to convert was freed or cut short; the message names the tensor.
    """
    result = list(tensors)
    others = [i for i, t in enumerate(result) if t is not None and t.dtype is not dtype]
    sources: list[torch.Tensor] = [result[i] for i in others]  # type: ignore[misc]
    if len(others) > 1 and sources[0].is_cuda and _is_eager_inference(sources):
        targets = [torch.empty_like(t, dtype=dtype) for t in sources]
        torch._foreach_copy_(targets, sources)
    else:
        targets = [to_dtype(names[i], t, dtype) for i, t in zip(others, sources, strict=True)]
    for i, target in zip(others, targets, strict=True):
        result[i] = target
    return result


def to_dtype(name: str, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `t` in this dtype; raise RuntimeError with its name if its memory was freed or cut short."""
    if t.dtype is not dtype and t.is_cpu:
        check_memory(name, t)
    return t.to(dtype)


def _is_eager_inference(tensors: list[torch.Tensor]) -> bool:
    if needs_grad(*tensors) or torch.compiler.is_compiling():
        return False
    return not is_transformed()


def empty_like_layout(x: torch.Tensor) -> torch.Tensor:
    """Return an empty tensor like `x` (batch, dim, len): channel-last in memory if `x` is, otherwise contiguous."""
    batch, dim, seqlen = x.shape
    if x.stride(1) == 1 and x.stride(2) != 1:
        return x.new_empty(batch, seqlen, dim).transpose(1, 2)
    return x.new_empty(batch, dim, seqlen)


def like_layout(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return `y` (batch, dim, len) in the dtype of `x`, laid out in memory as `empty_like_layout(x)` is."""
    y = y.to(x.dtype)
    return y.mT.contiguous().mT if x.stride(1) == 1 and x.stride(2) != 1 else y.contiguous()


def checkpoint_interval(*inputs: torch.Tensor | None) -> int:
    """Return the number of tokens between the states that an op saves for its backward pass; 0 if it saves none.

    Exported programs save none; their backward pass runs the forward pass again to make them. The number of states
    would be a symbol, torch.export would ask whether it is 1, and the answer would specialise the program to some
    lengths. Traced programs save none either: torch.jit.trace demands the same graph with and without gradients.
    """
    records = torch.compiler.is_exporting() or torch.jit.is_tracing()
    return CHECKPOINT_EVERY if needs_grad(*inputs) and not records else 0


def num_chunks(seqlen: int, checkpoint_every: int) -> int:
    """Return the number of chunks whose entry states are saved; 0 if `checkpoint_every` is 0."""
    return 0 if checkpoint_every == 0 else (seqlen + checkpoint_every - 1) // checkpoint_every
