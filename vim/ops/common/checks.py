"""Checks of the ops' arguments: each error names the argument, what it must be, and what it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vim.ops.common.eager import is_eager

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, value: object, axes: str) -> torch.Tensor:
    """Raise unless `value` is a tensor; `axes` describes it, for example "(batch, dim, len)"."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor {axes}, got {type(value).__name__}")
    return value


def check_floating(name: str, value: torch.Tensor) -> None:
    """Raise unless `value` has a floating dtype that the ops compute in."""
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")


def check_activation(name: str, value: object, axes: str) -> torch.Tensor:
    """Raise unless `value` is a floating tensor with the axes that `axes` lists, for example "(batch, dim, len)"."""
    tensor = check_tensor(name, value, axes)
    if tensor.dim() != axes.count(",") + 1:
        raise ValueError(f"{name} must be {axes}, got shape {tuple(tensor.shape)}")
    check_floating(name, tensor)
    return tensor


def check_axes(name: str, value: object, axes: str) -> torch.Size:
    """Raise unless `value` is a tensor with the axes that `axes` lists, none of them empty; return its shape."""
    tensor = check_tensor(name, value, axes)
    if tensor.dim() != axes.count(",") + 1 or 0 in tensor.shape:
        raise ValueError(f"{name} must be {axes}, no axis empty, got shape {tuple(tensor.shape)}")
    return tensor.shape


def check_length(name: str, length: int) -> None:
    """Raise unless a sequence has at least one token."""
    if length == 0:
        raise ValueError(f"{name} must have at least one token, got a length of 0")


def check_operand(
    name: str, value: object, shape: Sequence[int], axes: str, like: torch.Tensor, like_name: str
) -> torch.Tensor:
    """Raise unless `value` is a floating tensor of this shape on the device of `like`; any floating dtype."""
    tensor = check_tensor(name, value, axes)
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must be {axes} = {tuple(shape)}, got {tuple(tensor.shape)}")
    check_floating(name, tensor)
    check_device(name, tensor, like, like_name)
    return tensor


def check_like(name: str, value: object, shape: Sequence[int], axes: str, like: torch.Tensor, like_name: str) -> None:
    """Raise unless `value` has this shape and the dtype and device of `like`."""
    tensor = check_operand(name, value, shape, axes, like, like_name)
    if tensor.dtype != like.dtype:
        raise ValueError(f"{name} must have the dtype of {like_name}, {like.dtype}, got {tensor.dtype}")


def check_integers(
    name: str,
    value: object,
    shape: Sequence[int],
    axes: str,
    like: torch.Tensor,
    like_name: str,
    dtypes: Sequence[torch.dtype] = (torch.int32, torch.int64),
) -> torch.Tensor:
    """Raise unless `value` is a tensor of this shape, in one of `dtypes`, on the device of `like`."""
    tensor = check_tensor(name, value, axes)
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must be {axes} = {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {wanted}, got {tensor.dtype}")
    check_device(name, tensor, like, like_name)
    return tensor


def check_seq_idx(seq_idx: object, like: torch.Tensor, like_name: str) -> None:
    """Raise unless `seq_idx` is (batch, len), int32, on the device of `like` (batch, dim, len)."""
    shape = (like.shape[0], like.shape[2])
    check_integers("seq_idx", seq_idx, shape, "(batch, len)", like, like_name, (torch.int32,))


def check_device(name: str, value: torch.Tensor, like: torch.Tensor, like_name: str) -> None:
    """Raise unless `value` is on the device of `like`."""
    if value.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}, got {value.device}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")


def check_memory(name: str, value: object) -> None:
    """Raise unless the memory of a plain tensor is there: sharding and offloading free it and keep the tensor's sizes.

    After `untyped_storage().resize_(0)` most of torch's own kernels crash. While a graph is recorded or a function is
    transformed nothing is checked: tensors may have no memory then.
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
