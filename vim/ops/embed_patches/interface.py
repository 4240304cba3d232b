"""`embed_patches`, the function for users; the model runs it where its patch embedding is plain."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vim.ops.backends.registry import resolve_backend, runs_by_default
from vim.ops.common.checks import check_activation, check_axes, check_operand
from vim.ops.common.eager import is_eager
from vim.ops.embed_patches import register as register
from vim.ops.embed_patches.reference import patch_grid


def embed_patches(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    tokens: Tensor | None = None,
    pos_embed: Tensor | None = None,
    *,
    places: Sequence[int] = (),
    stride: tuple[int, int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Project patches to tokens, insert class tokens and add the position embedding, in one op.

    Args:
        images: (batch, in_chans, height, width); float32, bfloat16, float16 or float64, any strides.
        weight: (embed_dim, in_chans, patch height, patch width). It and the other parameters may be of any floating
            dtype.
        bias: (embed_dim,) or `None`.
        tokens: Class tokens, (class tokens, embed_dim), or `None`.
        pos_embed: (patches + class tokens, embed_dim) or `None`.
        places: Indices of the class tokens in the result, in ascending order.
        stride: Pixels from one patch to the next, (height, width); `None` is the size of a patch.
        backend: Name of a backend (see `available_backends`), or `None` for the fastest that applies.

    Returns:
        (batch, patches + class tokens, embed_dim), patches row by row, in the dtype of `images`. Under autocast the
        dtype is the widest of autocast's, the tokens' and the position embedding's.

    Raises:
        ValueError: A shape or device disagrees with `images`, or `places` and `tokens` do not fit together.
        TypeError: An argument is not a floating tensor.
        RuntimeError: The named backend cannot run here, or the memory of an argument was freed; the message says why.

    Source: Zhu et al. 2024, arXiv:2401.09417, Algorithm 1 and equation (4).
    """
    x = check_activation("images", images, "(batch, in_chans, height, width)")
    embed_dim, _, *patch = check_axes("weight", weight, "(embed_dim, in_chans, patch height, patch width)")
    check_operand("weight", weight, (embed_dim, x.shape[1], *patch), "(embed_dim, in_chans, ...)", x, "images")
    stride = (patch[0], patch[1]) if stride is None else stride
    if any(step < 1 for step in stride):
        raise ValueError(f"stride must be positive, got {tuple(stride)}")
    if x.shape[2] < patch[0] or x.shape[3] < patch[1]:
        raise ValueError(f"images must be at least as large as a patch, {tuple(patch)}, got {tuple(x.shape[2:])}")
    count = 0 if tokens is None else len(tokens)
    length = math.prod(patch_grid(x.shape, weight.shape, stride)) + count
    if len(places) != count or list(places) != sorted(set(places)) or any(not 0 <= p < length for p in places):
        raise ValueError(
            f"places must be {count} different numbers below {length}, in ascending order, got {list(places)}"
        )
    if bias is not None:
        check_operand("bias", bias, (embed_dim,), "(embed_dim,)", x, "images")
    if tokens is not None:
        check_operand("tokens", tokens, (count, embed_dim), "(class tokens, embed_dim)", x, "images")
    if pos_embed is not None:
        check_operand("pos_embed", pos_embed, (length, embed_dim), "(len, embed_dim)", x, "images")
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        for t in (tokens, pos_embed):
            dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    run = resolve_backend("embed_patches", backend, x)
    return run(x, weight, bias, tokens, pos_embed, list(places), list(stride), dtype)


def runs_embedding(images: Tensor) -> bool:
    """Return True if native kernels for `embed_patches` take such images, and no graph is recorded."""
    return bool(type(images) is Tensor and is_eager() and runs_by_default("embed_patches", "native", images))
