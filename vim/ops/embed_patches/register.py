"""Registration of `vim::embed_patches` and its backward with torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vim.ops.common.layout import accumulate_dtype
from vim.ops.common.registration import define_autograd, define_op
from vim.ops.embed_patches import reference
from vim.ops.embed_patches.reference import patch_grid

_INPUTS = "Tensor images, Tensor weight, Tensor? bias, Tensor? tokens, Tensor? pos_embed, int[] places, int[] stride"


def _fake(images: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    *_, places, stride, dtype = arguments
    length = math.prod(patch_grid(images.shape, weight.shape, stride)) + len(places)
    return images.new_empty(images.shape[0], length, weight.shape[0], dtype=dtype)


def _backward_fake(dout: Tensor, images: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *parameters, _, _, images_grad = arguments
    absent = accumulate_dtype(dout.dtype)
    return images.new_empty(images.shape if images_grad else 0), *(
        dout.new_empty(0, dtype=absent) if t is None else t.new_empty(t.shape) for t in parameters
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.places, ctx.stride, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(backward_op: Any, forward_op: Any, ctx: Any, dout: Tensor) -> Any:
    tensors, images_grad = ctx.saved_tensors, ctx.needs_input_grad[0]
    dimages, *grads = backward_op(dout, *tensors, ctx.places, ctx.stride, images_grad)
    present = [None if t is None else grad for t, grad in zip(tensors[1:], grads, strict=True)]
    return dimages if images_grad else None, *present, None, None, None


def _again(images: Tensor, *arguments: Any) -> Tensor:
    inputs: Any = (images, *arguments[:-1], torch.promote_types(images.dtype, torch.float32))
    return reference.embed_patches(*inputs)


def _flops(images: Any, weight: Any, *arguments: Any, **settings: Any) -> int:
    stride = arguments[4]
    return 2 * images[0] * math.prod(patch_grid(images, weight, stride)) * math.prod(weight)


def _backward_flops(dout: Any, images: Any, weight: Any, *arguments: Any, **settings: Any) -> int:
    return (1 + bool(arguments[-1])) * _flops(images, weight, *arguments)


define_op(
    "embed_patches",
    schema=f"({_INPUTS}, ScalarType dtype) -> Tensor",
    reference=reference.embed_patches,
    fake=_fake,
    flops=_flops,
)
define_op(
    "embed_patches_backward",
    schema=f"(Tensor dout, {_INPUTS}, bool images_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.embed_patches_backward,
    fake=_backward_fake,
    flops=_backward_flops,
)
define_autograd("embed_patches", reference=reference.embed_patches, save=_save, backward=_backward, again=_again)
