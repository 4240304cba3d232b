"""`vim::embed_patches` and its backward, as torch knows them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vim.ops.common.layout import accumulate_dtype
from vim.ops.common.registration import define_autograd, define_op
from vim.ops.embed_patches import reference

_INPUTS = "Tensor images, Tensor weight, Tensor? bias, Tensor? tokens, Tensor? pos_embed, int[] places, int[] stride"


def _patches(images: Any, weight: Any, stride: Any) -> Any:
    return ((images[2] - weight[2]) // stride[0] + 1) * ((images[3] - weight[3]) // stride[1] + 1)


def _fake(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor | None,
    pos_embed: Tensor | None,
    places: Any,
    stride: Any,
    dtype: torch.dtype,
) -> Tensor:
    length = _patches(images.shape, weight.shape, stride) + len(places)
    return images.new_empty(images.shape[0], length, weight.shape[0], dtype=dtype)


def _backward_fake(
    dout: Tensor,
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor | None,
    pos_embed: Tensor | None,
    places: Any,
    stride: Any,
    images_grad: bool,
) -> tuple[Tensor, ...]:
    def gradient(t: Tensor | None) -> Tensor:
        return dout.new_empty(0, dtype=accumulate_dtype(dout.dtype)) if t is None else t.new_empty(t.shape)

    dimages = images.new_empty(images.shape if images_grad else 0)
    return dimages, gradient(weight), gradient(bias), gradient(tokens), gradient(pos_embed)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, weight, bias, tokens, pos_embed, ctx.places, ctx.stride, _ = inputs
    ctx.save_for_backward(images, weight, bias, tokens, pos_embed)


def _backward(backward_op: Any, forward_op: Any, ctx: Any, dout: Tensor) -> Any:
    images, weight, bias, tokens, pos_embed = ctx.saved_tensors
    dimages, dweight, dbias, dtokens, dpos_embed = backward_op(
        dout, images, weight, bias, tokens, pos_embed, ctx.places, ctx.stride, ctx.needs_input_grad[0]
    )
    gradients = zip((dbias, dtokens, dpos_embed), (bias, tokens, pos_embed), strict=True)
    of_others = [None if t is None else gradient for gradient, t in gradients]
    return dimages if ctx.needs_input_grad[0] else None, dweight, *of_others, None, None, None


def _again(images: Tensor, *arguments: Any) -> Tensor:
    inputs: Any = (images, *arguments[:-1], torch.promote_types(images.dtype, torch.float32))
    return reference.embed_patches(*inputs)


def _flops(images: Any, weight: Any, *arguments: Any, **settings: Any) -> int:
    stride = arguments[4]
    return 2 * images[0] * _patches(images, weight, stride) * math.prod(weight)


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
