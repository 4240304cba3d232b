"""Patch embedding with patches that may overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import resample_patch_embed
from torch import Tensor, nn

from vim.layers.checks import check_counts
from vim.layers.token_sequence import insert_tokens
from vim.layers.traced import fx_leaf, is_symbolic
from vim.layers.watched import DefinedForwards, is_patch_projection, is_watched
from vim.ops.embed_patches.interface import embed_patches, runs_embedding

Size = int | tuple[int, int]
_Pair = tuple[int, int]


class PatchEmbed(nn.Module):
    """Projection of patches to tokens: timm's patch embedding with a separate stride.

    Args:
        img_size: (height, width) or a side, in pixels.
        patch_size: Likewise; the extent of a patch.
        stride: Likewise; the step between patches. `None` is the patch size: patches do not overlap.
        in_chans: Channels of the image.
        embed_dim: Width of the tokens.
        bias: Give the projection a bias.
        strict_img_size: Refuse images of another size than `img_size`.
        dynamic_img_pad: Pad images at the right and the bottom until patches cover them, instead of refusing them.

    Attributes:
        img_size, patch_size, stride: (height, width) in pixels.
        grid_size: Patches along (height, width) of an image of `img_size`.
        num_patches: Patches in an image of `img_size`.

    Shape:
        (batch, in_chans, height, width) -> (batch, patches, embed_dim), row by row.

    Raises:
        ValueError: A size is not positive, a patch is larger than the image, patches leave rows or columns of it
            uncovered, or an image does not fit the model.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        stride: Size | None = None,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_counts(1, in_chans=in_chans, embed_dim=embed_dim)
        self.patch_size = as_size("patch_size", patch_size)
        self.stride = self.patch_size if stride is None else as_size("patch_stride", stride)
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self._set_img_size(img_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.stride, bias=bias, device=device, dtype=dtype)
        self.norm = nn.Identity()

    def _set_img_size(self, img_size: Size) -> None:
        self.img_size = as_size("img_size", img_size)
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def resized(self, img_size: Size | None = None, patch_size: Size | None = None) -> tuple[tuple[int, int], ...]:
        """Return (img_size, patch_size, stride, grid_size) as `set_input_size` would set them.

        The stride scales with the patch size.

        Raises:
            ValueError: A size is not positive, the stride would be fractional, a patch is larger than the image, or
                patches do not cover the image.
        """
        patch = self.patch_size if patch_size is None else as_size("patch_size", patch_size)
        size = self.img_size if img_size is None else as_size("img_size", img_size)
        scaled = tuple(s * new / old for s, new, old in zip(self.stride, patch, self.patch_size, strict=True))
        if any(s != int(s) for s in scaled):
            raise ValueError(f"patch_size {patch} would make a fractional stride {scaled}")
        stride = (int(scaled[0]), int(scaled[1]))
        return size, patch, stride, self._count(size, patch, stride)

    @torch.no_grad()
    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Change the image size, and the patch size by resampling the filters; the stride scales with the patches."""
        size, patch, stride, _ = self.resized(img_size, patch_size)
        if patch != self.patch_size:
            old, self.patch_size, self.stride = self.proj, patch, stride
            channels = old.in_channels, old.out_channels
            proj = nn.Conv2d(*channels, patch, stride, bias=old.bias is not None).to(old.weight)
            proj.weight.copy_(resample_patch_embed(old.weight, list(patch), verbose=True))
            proj.weight.requires_grad_(old.weight.requires_grad)
            proj.bias = old.bias
            self.proj = proj.train(old.training)
        self._set_img_size(size)

    def feat_ratio(self, as_scalar: bool = True) -> Size:
        """Return the pixels from one token to the next: the larger of the two axes, or both."""
        return max(self.stride) if as_scalar else self.stride

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return the patches along (height, width) of an image of `img_size`, after padding if that is on."""
        return self._count(img_size, self.patch_size, self.stride)

    def covered_size(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Return height and width in pixels that a grid of patches covers; an image that is padded has fewer."""
        return _covered(grid, self.patch_size, self.stride)

    def _count(
        self, img_size: tuple[int, int], patch_size: tuple[int, int], stride: tuple[int, int]
    ) -> tuple[int, int]:
        if not self.dynamic_img_pad and (img_size[0] < patch_size[0] or img_size[1] < patch_size[1]):
            raise ValueError(f"img_size must be at least patch_size = {patch_size}, got {tuple(img_size)}")
        rows, columns = (
            (math.ceil((max(size - patch, 0)) / step) if self.dynamic_img_pad else (size - patch) // step) + 1
            for size, patch, step in zip(img_size, patch_size, stride, strict=True)
        )
        if not self.dynamic_img_pad and not is_symbolic(img_size):
            covered = _covered((rows, columns), patch_size, stride)
            if covered != tuple(img_size):
                raise ValueError(
                    f"img_size must be covered by patches of patch_size = {patch_size} every patch_stride = {stride} "
                    f"pixels, which cover {covered} of {tuple(img_size)}: change it, or pad images with "
                    "dynamic_img_pad=True"
                )
        return rows, columns

    @fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens, (batch, patches, embed_dim)."""
        return self.norm(self.proj(self._fitted(x)).flatten(2).mT)

    def embed(self, x: Tensor, tokens: Sequence[Tensor], places: tuple[int, ...], pos_embed: Tensor | None) -> Tensor:
        """Return the patch tokens with class tokens inserted, plus the position embedding.

        If this module is plain and has no hooks, `vim.ops.embed_patches` runs instead of it.

        Args:
            x: Images, (batch, in_chans, height, width).
            tokens: Class tokens, (1, 1, embed_dim) each.
            places: Their positions in the result, in ascending order.
            pos_embed: (1, len, embed_dim) or `None`.

        Returns:
            (batch, len, embed_dim).
        """
        if self._is_plain(x, tokens, pos_embed):
            table = torch.cat([token[0] for token in tokens]) if tokens else None
            positions = None if pos_embed is None else pos_embed[0]
            weight, bias = self.proj.weight, self.proj.bias
            return embed_patches(self._fitted(x), weight, bias, table, positions, places=places, stride=self.stride)
        y = self(x)
        y = insert_tokens(y, [token.expand(y.shape[0], -1, -1) for token in tokens], places)
        return y if pos_embed is None else y + pos_embed

    def _is_plain(self, x: Tensor, tokens: Sequence[Tensor], pos_embed: Tensor | None) -> bool:
        """Return True if one op may run in place of this module and what follows."""
        tensors = [t for t in (self.proj._parameters.get("weight"), *tokens, pos_embed) if t is not None]
        return (
            runs_embedding(x)
            and type(self) is PatchEmbed
            and _FORWARDS.run()
            and not is_watched(self)
            and is_patch_projection(self.proj)
            and self.proj.stride == self.stride
            and type(self.norm) is nn.Identity
            and not is_watched(self.norm)
            # Others are broadcast, to the images of a batch or to the tokens of a sequence.
            and all(token.shape[:2] == (1, 1) for token in tokens)
            and (pos_embed is None or (pos_embed.shape[0] == 1 and pos_embed.shape[1] > 1))
            and all(type(t) is nn.Parameter or type(t) is Tensor for t in tensors)
            and (torch.is_autocast_enabled(x.device.type) or all(t.dtype is x.dtype for t in tensors))
        )

    def _fitted(self, x: Tensor) -> Tensor:
        """Return the images, padded if that is on; raise if they do not fit the model."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a tensor of normalised floating images, got {got}")
        if x.dim() != 4 or x.shape[1] != self.proj.in_channels:
            shape = tuple(x.shape)
            raise ValueError(
                f"x must be (batch, in_chans, height, width) with in_chans = {self.proj.in_channels}, got {shape}"
            )
        height, width = x.shape[-2:]
        if self.strict_img_size and (height, width) != self.img_size:
            raise ValueError(
                f"x must be an image of img_size = {self.img_size}, got {(height, width)}; "
                "see set_input_size and dynamic_img_size for other sizes"
            )
        if self.dynamic_img_pad:
            covered = self.covered_size(self.dynamic_feat_size((height, width)))
            x = F.pad(x, (0, covered[1] - width, 0, covered[0] - height))
        else:
            self.dynamic_feat_size((height, width))  # raises if patches do not cover the image
        return x


def _covered(grid: tuple[int, int], patch_size: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
    return (grid[0] - 1) * stride[0] + patch_size[0], (grid[1] - 1) * stride[1] + patch_size[1]


_FORWARDS = DefinedForwards((PatchEmbed, nn.Conv2d, nn.Identity), ("conv2d",))


def as_size(name: str, value: object) -> tuple[int, int]:
    """Return `value` as (height, width).

    Raises:
        ValueError: `value` is not one or two positive integers.
    """
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in pair):
        raise ValueError(f"{name} must be a positive integer or two of them, got {value!r}")
    return pair
