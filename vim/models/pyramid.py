"""Feature maps at four resolutions, for detectors and segmentation heads that expect a pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from timm.models._features import FeatureInfo, feature_take_indices
from torch import Tensor, nn

from vim.layers.checks import check_kind
from vim.models.vision_mamba import Tap, VisionMamba

_REDUCTIONS = (4, 8, 16, 32)
PyramidNorm = Literal["group", "batch"]


class VimPyramid(nn.Module):
    """Feature maps of selected blocks at 1/4, 1/8, 1/16 and 1/32 of the image size.

    The maps of a plain model have one resolution. Each level normalises the map of a block, and enlarges it by
    transposed convolutions or reduces it by maximum pooling. timm accepts this class as `feature_cls`.

    Args:
        model: The backbone. Modules that no level needs are removed from it: the head, the final norm, later blocks.
        out_indices: Levels to return, from 0 (1/4) to 3 (1/32); a number n selects the last n.
        blocks: The block that feeds each of the four levels; `None` takes the last block of each quarter of the model.
        tap: What a level reads of its block: "sum" (residual plus hidden state) or "mixer" (the mixer's output).
        norm: "group" normalises each map, and each enlarged one, over all its channels. "batch" has the layers of the
            original: no norm at the entry, and batch norm between two enlargements.

    Attributes:
        feature_info: timm's description of the levels.

    Shape:
        (batch, in_chans, height, width) -> a list of (batch, embed_dim, height / reduction, width / reduction).

    Raises:
        ValueError: A level, a block, a tap or a norm does not exist, or the step between patches is not a power of two
            up to 32.

    Source: Li et al. 2022, arXiv:2203.16527, section 3, for the simple pyramid; Bao et al. 2021, arXiv:2106.08254, for
    one block a level.
    """

    def __init__(
        self,
        model: VisionMamba,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        blocks: Sequence[int] | None = None,
        tap: Tap = "sum",
        norm: PyramidNorm = "group",
    ) -> None:
        super().__init__()
        check_kind("tap", tap, ("sum", "mixer"))
        check_kind("norm", norm, ("group", "batch"))
        step = set(model.patch_embed.stride)
        if len(step) != 1 or not step <= {1, 2, *_REDUCTIONS}:
            stride = model.patch_embed.stride
            raise ValueError(f"patch_stride must be a power of two up to 32 for a pyramid, got {stride}")
        chosen = blocks or [max(model.depth * quarter // 4 - 1, 0) for quarter in (1, 2, 3, 4)]
        if len(chosen) != len(_REDUCTIONS) or not all(0 <= block < model.depth for block in chosen):
            raise ValueError(f"blocks must be four of 0 to {model.depth - 1}, got {list(chosen)}")
        levels = list(out_indices) if isinstance(out_indices, Sequence) else out_indices
        self.levels, _ = feature_take_indices(len(_REDUCTIONS), levels)
        self.blocks = [chosen[level] for level in self.levels]
        model.prune_intermediate_layers(sorted(set(self.blocks)), prune_norm=True)
        self.model, self.tap = model, tap
        weight = model.patch_embed.proj.weight
        self.resize = nn.ModuleList(
            _make_level(model.embed_dim, step.copy().pop(), _REDUCTIONS[level], norm).to(weight)
            for level in self.levels
        )
        info = [
            {"num_chs": model.embed_dim, "reduction": reduction, "module": f"resize.{i}", "index": i}
            for i, reduction in enumerate(_REDUCTIONS)
        ]
        self.feature_info = FeatureInfo(info, tuple(self.levels))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks of the backbone in the backward pass."""
        self.model.set_grad_checkpointing(enable)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the maps, finest first."""
        indices = sorted(set(self.blocks))
        maps = self.model.forward_intermediates(x, indices=indices, intermediates_only=True, tap=self.tap)
        by_block = dict(zip(indices, maps, strict=True))
        return [resize(by_block[block]) for resize, block in zip(self.resize, self.blocks, strict=True)]


def _make_level(dim: int, step: int, reduction: int, norm: PyramidNorm) -> nn.Sequential:
    """Return layers that normalise a map and resize it from `step` to `reduction` pixels per cell."""
    layers: list[nn.Module] = [nn.GroupNorm(1, dim)] if norm == "group" else []
    while step > reduction:
        layers.append(nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2))
        step //= 2
        if step > reduction:
            layers += [nn.GroupNorm(1, dim) if norm == "group" else nn.BatchNorm2d(dim), nn.GELU()]
    if step < reduction:
        layers.append(nn.MaxPool2d(reduction // step))
    return nn.Sequential(*layers)
