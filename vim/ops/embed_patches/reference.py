"""The first step of the model in plain PyTorch: the specification of every other backend.

sequence = patches of the images, each times weight, plus bias, with the class tokens inserted at `places`
out      = sequence + pos_embed
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vim.ops.common.layout import accumulate_dtype


def embed_patches(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor | None,
    pos_embed: Tensor | None,
    places: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Return the tokens, (batch, patches + class tokens, embed_dim), in `dtype`."""
    acc = accumulate_dtype(dtype)
    with torch.autocast(images.device.type, enabled=False):
        maps = F.conv2d(images.to(acc), weight.to(acc), None if bias is None else bias.to(acc), tuple(stride))
    sequence = maps.flatten(2).mT
    for i, place in enumerate(places):
        token = tokens[i].to(acc).expand(sequence.shape[0], 1, -1)  # type: ignore[index]
        sequence = torch.cat([sequence[:, :place], token, sequence[:, place:]], dim=1)
    return (sequence if pos_embed is None else sequence + pos_embed.to(acc)).to(dtype).contiguous()


def embed_patches_backward(dout: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the gradients of images (empty unless wanted), weight, bias, tokens and pos_embed (empty where absent).

    Args:
        dout: Gradient of the tokens.
        arguments: As `embed_patches` takes them, with "is the images' gradient wanted?" in the place of the dtype.
    """
    images, weight, bias, tokens, pos_embed, places, stride, images_grad = arguments
    acc = accumulate_dtype(dout.dtype)
    wide = dout.to(acc)
    batch, length, embed_dim = dout.shape
    is_patch = torch.ones(length, dtype=torch.bool, device=dout.device)
    is_patch[list(places)] = False
    dmaps = wide[:, is_patch].mT.reshape(batch, embed_dim, *patch_grid(images.shape, weight.shape, stride))
    with torch.autocast(images.device.type, enabled=False):
        dimages, dweight, _ = torch.ops.aten.convolution_backward(
            dmaps, images.to(acc), weight.to(acc), None, list(stride), [0, 0], [1, 1], False, [0, 0], 1,
            [images_grad, True, False],
        )  # fmt: skip
    empty = dout.new_empty(0, dtype=acc)
    return (
        dimages.to(images.dtype) if images_grad else images.new_empty(0),
        dweight.to(weight.dtype),
        empty if bias is None else dmaps.sum((0, 2, 3)).to(bias.dtype),
        empty if tokens is None else wide[:, ~is_patch].sum(0).to(tokens.dtype),
        empty if pos_embed is None else wide.sum(0).to(pos_embed.dtype),
    )


def patch_grid(images: Sequence[int], weight: Sequence[int], stride: Sequence[int]) -> tuple[int, int]:
    """Return the patches along (height, width), from the shapes of images and weight and the stride in pixels."""
    return (images[2] - weight[2]) // stride[0] + 1, (images[3] - weight[3]) // stride[1] + 1
