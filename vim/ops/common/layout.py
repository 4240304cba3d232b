"""Memory layout and precision that every backend agrees on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from vim.ops.common.checks import check_memory, needs_grad
from vim.ops.common.eager import is_transformed

# Tokens between two saved states. A backward pass rebuilds the states of one chunk at a time.
CHECKPOINT_EVERY = 64


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of states, decays, softplus, weights and sums: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_dtype(
    dtype: torch.dtype, names: Sequence[str], tensors: Iterable[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """The tensors in this dtype; those that have it already, and `None`, as they are.

    On a GPU without gradients all are converted by one kernel: the conversions are small and their launches are not.

    Raises:
        RuntimeError: The memory of one to convert was freed or cut short; the message has its name.
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
    """`t` in this dtype; an error with its name where the memory to convert was freed or cut short."""
    if t.dtype is not dtype and t.is_cpu:
        check_memory(name, t)
    return t.to(dtype)


def _is_eager_inference(tensors: list[torch.Tensor]) -> bool:
    if needs_grad(*tensors) or torch.compiler.is_compiling():
        return False
    return not is_transformed()


def empty_like_layout(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor like `x` (batch, dim, len): channel-last in memory where `x` is, contiguous elsewhere."""
    batch, dim, seqlen = x.shape
    if x.stride(1) == 1 and x.stride(2) != 1:
        return x.new_empty(batch, seqlen, dim).transpose(1, 2)
    return x.new_empty(batch, dim, seqlen)


def checkpoint_interval(*inputs: torch.Tensor | None) -> int:
    """Tokens between the states that an op saves for its backward pass; 0 where it saves none.

    An exported program saves none, and its backward pass makes them: their number is a symbol there, of which
    torch.export asks whether it is one, and the answer would bind the program to sequences of one kind. A traced one
    saves none either: torch.jit.trace compares the graphs that it records with gradients and without.
    """
    records = torch.compiler.is_exporting() or torch.jit.is_tracing()
    return CHECKPOINT_EVERY if needs_grad(*inputs) and not records else 0


def num_chunks(seqlen: int, checkpoint_every: int) -> int:
    """Number of chunks whose entry states are saved; none where `checkpoint_every` is 0."""
    return 0 if checkpoint_every == 0 else (seqlen + checkpoint_every - 1) // checkpoint_every
