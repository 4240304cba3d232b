"""The heads of a detector: torchvision's, with norms, and with outputs in float32 under autocast."""

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

_BOX_CELLS = 7
_MASK_CELLS = 14


class ProposalHead(RPNHead):
    """Scores and shifts of the anchors at each cell, in float32: bfloat16 would move boxes by pixels.

    Args:
        channels: Channels of the maps.
        anchors: Anchors at a cell.
        convolutions: Convolutions before the two outputs; ViTDet has two.
    """

    def __init__(self, channels: int, anchors: int, convolutions: int = 2) -> None:
        super().__init__(channels, anchors, conv_depth=convolutions)

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return scores (batch, anchors, rows, columns) and shifts (batch, 4 anchors, rows, columns) of each level."""
        scores, shifts = super().forward(x)
        return [tensor.float() for tensor in scores], [tensor.float() for tensor in shifts]


class BoxPredictor(FastRCNNPredictor):
    """Logits and box shifts of a region, in float32.

    Args:
        features: Features of a region.
        num_classes: Classes, the background included.
        class_agnostic: Predict one box for all classes. It is repeated for each class, as torchvision's losses expect.
    """

    def __init__(self, features: int, num_classes: int, class_agnostic: bool = False) -> None:
        super().__init__(features, num_classes)
        self._copies = 1
        if class_agnostic:
            self.bbox_pred = nn.Linear(features, 4)
            self._copies = num_classes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (regions, num_classes) and shifts (regions, 4 num_classes)."""
        logits, shifts = super().forward(x)
        return logits.float(), shifts.float().repeat(1, self._copies)


class MaskPredictor(MaskRCNNPredictor):
    """Mask logits of a region for each class, in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (regions, num_classes, 28, 28)."""
        return super().forward(x).float()


def make_box_head(channels: int, convolutions: int, features: int) -> nn.Module:
    """Return convolutions with a LayerNorm over channels, and a linear layer: (regions, features)."""
    return FastRCNNConvFCHead(
        (channels, _BOX_CELLS, _BOX_CELLS), [channels] * convolutions, [features], norm_layer=LayerNorm2d
    )


def make_mask_head(channels: int, convolutions: int) -> nn.Module:
    """Return convolutions with a LayerNorm over channels: (regions, channels, 14, 14)."""
    return MaskRCNNHeads(channels, [channels] * convolutions, dilation=1, norm_layer=LayerNorm2d)


def make_box_pool(strides: list[int]) -> MultiScaleRoIAlign:
    """Return the pooling of regions from levels with these strides: (regions, channels, 7, 7)."""
    return _make_pool(strides, _BOX_CELLS)


def make_mask_pool(strides: list[int]) -> MultiScaleRoIAlign:
    """Return the pooling of regions from levels with these strides: (regions, channels, 14, 14)."""
    return _make_pool(strides, _MASK_CELLS)


def _make_pool(strides: list[int], cells: int) -> MultiScaleRoIAlign:
    pool = MultiScaleRoIAlign([str(index) for index in range(len(strides))], output_size=cells, sampling_ratio=2)
    # torchvision would infer the scales from the first images, whose padding misleads it.
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = initLevelMapper(strides[0].bit_length() - 1, strides[-1].bit_length() - 1)
    return pool
