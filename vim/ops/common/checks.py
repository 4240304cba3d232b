"""Checks at the door of the ops: each names the argument, what it must be and what it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vim.ops.common.eager import is_eager

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_activation(name: str, value: object, axes: str) -> torch.Tensor:
    """`value` must be a floating tensor with the axes named in `axes`, for example "(batch, dim, len)"."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor {axes}, got {type(value).__name__}")
    if value.dim() != axes.count(",") + 1:
        raise ValueError(f"{name} must be {axes}, got shape {tuple(value.shape)}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    return value


def check_length(name: str, length: int) -> None:
    """A sequence has at least one token."""
    if length == 0:
        raise ValueError(f"{name} must have at least one token, got a length of 0")


def check_like(name: str, value: object, shape: Sequence[int], axes: str, like: torch.Tensor, like_name: str) -> None:
    """`value` must have this shape and the dtype and device of `like`."""
    check_operand(name, value, shape, axes, like, like_name)
    assert isinstance(value, torch.Tensor)
    if value.dtype != like.dtype:
        raise ValueError(f"{name} must have the dtype of {like_name}, {like.dtype}, got {value.dtype}")


def check_operand(
    name: str, value: object, shape: Sequence[int], axes: str, like: torch.Tensor, like_name: str
) -> None:
    """`value` must be a real floating tensor of this shape on the device of `like`; any floating dtype."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor {axes}, got {type(value).__name__}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must be {axes} = {tuple(shape)}, got {tuple(value.shape)}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    check_device(name, value, like, like_name)


def check_device(name: str, value: torch.Tensor, like: torch.Tensor, like_name: str) -> None:
    """`value` must be on the device of `like`."""
    if value.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}, got {value.device}")


def check_memory(name: str, value: object) -> None:
    """A plain tensor must lie within its memory, which sharding and offloading take from under tensors that keep sizes.

    Torch's own kernels read what is not there: `untyped_storage().resize_(0)` makes most of them crash. Nothing is
    asked where graphs are recorded or functions transformed: tensors may have no memory there.
    """
    if (type(value) is not torch.Tensor and type(value) is not torch.nn.Parameter) or not is_eager():
        return
    held = value.untyped_storage().nbytes()
    if value.is_contiguous():
        reach = value.numel()
    else:
        steps = zip(value.shape, value.stride(), strict=True)
        reach = 1 + sum((size - 1) * stride for size, stride in steps)
    needed = (value.storage_offset() + reach) * value.itemsize
    if held < needed and value.numel() > 0:
        raise RuntimeError(
            f"{name} needs {needed} bytes of memory and its storage has {held}: it was freed or cut short"
        )


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """`value` must be one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd will record an op on these tensors."""
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors)
