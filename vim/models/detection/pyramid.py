"""The simple feature pyramid: every level of a detector from the last map of a plain backbone."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn


class SimpleFeaturePyramid(nn.Module):
    """Feature maps at several scales of the last map of a plain backbone, for the detectors of torchvision.

    The last map is the sum of residual and hidden state. A level enlarges it by transposed convolutions, which halve
    the channels, or reduces it by maximum pooling. A 1 x 1 and a 3 x 3 convolution then make all levels equally wide.
    The extra level takes every second cell of the coarsest level.

    Args:
        model: A model of timm with one resolution, such as `vim.VisionMamba`. Its head and its final norm are removed.
        channels: Channels of every level.
        scales: Scales of the levels, finest first; powers of two.

    Attributes:
        out_channels: Channels of every level.
        strides: Pixels per cell of every level, the extra one included.

    Shape:
        (batch, in_chans, height, width) -> (batch, channels, height / stride, width / stride) by name: "0", "1", ...,
        and "pool" for the extra level.

    Raises:
        ValueError: A scale is not a power of two, the scales do not halve from level to level, or the width of the
            model cannot be halved as often as the finest level needs.

    Source: Li et al. 2022, arXiv:2203.16527, section 3.
    """

    def __init__(self, model: nn.Module, channels: int = 256, scales: Sequence[float] = (4.0, 2.0, 1.0, 0.5)) -> None:
        super().__init__()
        backbone: Any = model
        step, dim = backbone.feature_info[-1]["reduction"], backbone.feature_info[-1]["num_chs"]
        strides = [step / scale for scale in scales]
        if not scales or any(stride < 1 or stride != 2 ** (int(stride).bit_length() - 1) for stride in strides):
            raise ValueError(
                f"scales must give strides that are powers of two, got {tuple(scales)} for a model with a stride of "
                f"{step}"
            )
        if any(coarse != 2 * fine for fine, coarse in pairwise(strides)):
            raise ValueError(f"scales must halve from level to level, got {tuple(scales)}")
        if dim % max(1, int(max(scales))):
            raise ValueError(f"the width of the model must be a multiple of {max(scales):g} for scales, got {dim}")
        backbone.prune_intermediate_layers(1, prune_norm=True)
        self.model = model
        self.out_channels = channels
        self.strides = [*map(int, strides), 2 * int(strides[-1])]
        self.levels = nn.ModuleList(_make_level(dim, channels, scale) for scale in scales)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the maps by name, finest first."""
        backbone: Any = self.model
        (last,) = backbone.forward_intermediates(x, indices=1, intermediates_only=True)
        maps = OrderedDict((str(index), level(last)) for index, level in enumerate(self.levels))
        maps["pool"] = F.max_pool2d(maps[str(len(maps) - 1)], kernel_size=1, stride=2)
        return maps


def _make_level(dim: int, channels: int, scale: float) -> nn.Sequential:
    """Return layers that resize a map of `dim` channels by `scale`, and bring it to `channels` channels."""
    layers: list[nn.Module] = []
    if scale < 1:
        layers.append(nn.MaxPool2d(round(1 / scale)))
    while scale > 1:
        if layers:
            layers += [LayerNorm2d(dim), nn.GELU()]
        layers.append(nn.ConvTranspose2d(dim, dim // 2, kernel_size=2, stride=2))
        dim, scale = dim // 2, scale / 2
    return nn.Sequential(
        *layers,
        nn.Conv2d(dim, channels, kernel_size=1, bias=False),
        LayerNorm2d(channels),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(channels),
    )
