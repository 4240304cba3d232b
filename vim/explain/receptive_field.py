"""Effective receptive fields: which pixels a token of the last layer depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vim.explain.checks import check_gradients, check_images, kind_of
from vim.explain.modes import frozen, in_evaluation
from vim.layers import PatchEmbed
from vim.layers.checks import check_counts, check_kind


@dataclass(frozen=True)
class ReceptiveField:
    """An effective receptive field.

    Attributes:
        map: (height, width), float32: mean over images of the absolute gradients of a token by each pixel, summed
            over channels; the largest is 1.
        center: Row and column of the pixel in the token's middle; the image's middle for a class token.
    """

    map: Tensor
    center: tuple[int, int]

    def area(self, share: float) -> float:
        """Return the part of the image's area that holds a share of the field.

        The area is the smallest rectangle around the center, of the image's proportions and cut at its edges.

        Args:
            share: Above 0, at most 1.

        Raises:
            ValueError: `share` is out of range.

        Source: Ding et al. 2022, arXiv:2203.06717, section 5 (RepLKNet), for the centre of an image.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {share}")
        height, width = self.map.shape
        row, column = self.center
        rows = (torch.arange(height) - row).abs() / max(height / 2, 1)
        columns = (torch.arange(width) - column).abs() / max(width / 2, 1)
        radius = torch.maximum(rows[:, None], columns[None]).flatten()
        order = radius.argsort()
        held = self.map.flatten()[order].double().cumsum(0)
        needed = int(torch.searchsorted(held, share * float(held[-1]) * (1 - 1e-12)))
        reached = radius[order[min(needed, len(order) - 1)]]
        return float((radius <= reached).double().mean())


def receptive_field(
    model: nn.Module, images: Tensor, token: Literal["center", "class"] = "center", *, batch_size: int = 4
) -> ReceptiveField:
    """Measure the effective receptive field of a token after the last block and its norm.

    Args:
        model: A model with timm's `forward_intermediates`, such as `vim.VisionMamba` or DeiT; it is run in evaluation
            mode and left as it was.
        images: Normalised images, (batch, channels, height, width); the field is a mean over them.
        token: "center" (the patch in the image's middle) or "class" (the class token, the mean of several).
        batch_size: Images at a time.

    Raises:
        RuntimeError: Gradients are off by `torch.inference_mode()`, here or where the model was made.
        TypeError: The model has no `forward_intermediates`, or `images` is not a floating tensor.
        ValueError: The model has no class token, or the images do not fit.

    Source: Luo et al. 2016, arXiv:1701.04128, section 2.
    """
    check_gradients(model)
    check_kind("token", token, ("center", "class"))
    check_counts(1, batch_size=batch_size)
    if not hasattr(model, "forward_intermediates"):
        raise TypeError(f"model must have timm's forward_intermediates, got {kind_of(model)}")
    check_images(images, getattr(model, "in_chans", images.shape[1] if isinstance(images, Tensor) else 0))
    if token == "class" and not getattr(model, "num_prefix_tokens", 0):
        raise ValueError("token must be 'center' for a model without a class token")
    height, width = images.shape[2:]
    total = torch.zeros(height, width, dtype=torch.float64)
    center = (height // 2, width // 2)
    with in_evaluation(model), frozen(model), torch.enable_grad():
        for start in range(0, len(images), batch_size):
            pixels = images[start : start + batch_size].detach().clone().requires_grad_()
            chosen, cell = _token(model, pixels, token)
            (gradient,) = torch.autograd.grad(chosen.float().sum(), pixels)
            total += gradient.abs().sum((0, 1)).cpu().double()
            if cell is not None:
                (row, rows), (column, columns) = cell
                embed = getattr(model, "patch_embed", None)
                padded = embed.covered_size((rows, columns)) if isinstance(embed, PatchEmbed) else (height, width)
                middle = (2 * row + 1) * padded[0] // (2 * rows), (2 * column + 1) * padded[1] // (2 * columns)
                center = min(middle[0], height - 1), min(middle[1], width - 1)
    return ReceptiveField((total / total.max().clamp_min(torch.finfo(torch.float64).tiny)).float(), center)


def _token(
    model: nn.Module, pixels: Tensor, token: str
) -> tuple[Tensor, tuple[tuple[int, int], tuple[int, int]] | None]:
    """Return the token, (batch, dim), and its row and column of how many, or `None` for a class token."""
    has_prefix = getattr(model, "num_prefix_tokens", 0) > 0
    run: Any = model.forward_intermediates
    prefix_tokens = {"return_prefix_tokens": True} if has_prefix else {}
    (last,) = run(pixels, 1, norm=True, intermediates_only=True, **prefix_tokens)
    if token == "class":
        return last[1].mean(1), None
    patches = last[0] if has_prefix else last
    rows, columns = patches.shape[2:]
    return patches[:, :, rows // 2, columns // 2], ((rows // 2, rows), (columns // 2, columns))
