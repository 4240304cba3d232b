"""Mask R-CNN and Cascade Mask R-CNN over a Vim backbone, made of torchvision's parts."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from vim.config.detection import DetectionConfig
from vim.models.detection.cascade import CascadeRoIHeads
from vim.models.detection.heads import (
    BoxPredictor,
    MaskPredictor,
    ProposalHead,
    make_box_head,
    make_box_pool,
    make_mask_head,
    make_mask_pool,
)
from vim.models.detection.pyramid import SimpleFeaturePyramid
from vim.models.detection.transform import FitTransform

_ASPECT_RATIOS = (0.5, 1.0, 2.0)
# Cascade R-CNN, arXiv:1712.00726, section 4.3: thresholds and box weights of the stages.
_STAGES = (
    (0.5, (10.0, 10.0, 5.0, 5.0)),
    (0.6, (20.0, 20.0, 10.0, 10.0)),
    (0.7, (30.0, 30.0, 15.0, 15.0)),
)


class Detector(GeneralizedRCNN):
    """A detector of torchvision, with what timm's optimizers ask of a model.

    In training it maps images and targets to losses by name. Otherwise it maps images to a dictionary for each image:
    `boxes` (n, 4) in pixels of the image, `labels` (n,) from 1, `scores` (n,), and `masks` (n, 1, height, width)
    between 0 and 1. Images are a list of (in_chans, height, width) of any size, or a batch, with values from 0 to 1.
    """

    def forward(self, images: Any, targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Return losses by name in training, otherwise the detections of each image; without targets always these."""
        if targets is None and self.training:
            with self._evaluating():
                return super().forward(images)
        return super().forward(images, targets)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Put all modules into evaluation mode within the block."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode

    @property
    def _timm_model(self) -> Any:
        return self.backbone.model

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters of the backbone that must not decay."""
        return {f"backbone.model.{name}" for name in self._timm_model.no_weight_decay()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that assign parameters to layers; pyramid and heads come after the last block."""
        return _below("backbone.model.", self._timm_model.group_matcher(coarse))

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks of the backbone in the backward pass."""
        self._timm_model.set_grad_checkpointing(enable)


def _below(prefix: str, patterns: Any) -> Any:
    """Return timm's patterns for names that begin with a prefix."""
    if isinstance(patterns, dict):
        return {group: _below(prefix, pattern) for group, pattern in patterns.items()}
    if isinstance(patterns, (list, tuple)) and not isinstance(patterns[0], str):
        return [(_below(prefix, pattern), *rest) for pattern, *rest in patterns]
    if isinstance(patterns, str):
        return "|".join(f"^{re.escape(prefix)}{part.removeprefix('^')}" for part in patterns.split("|"))
    return patterns


def build_detector(
    model: nn.Module,
    num_classes: int,
    settings: DetectionConfig,
    image_shape: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Detector:
    """Build a detector over a backbone.

    Args:
        model: A model of timm with one resolution; its head and its final norm are removed.
        num_classes: Classes, without the background.
        settings: The settings of pyramid and heads.
        image_shape: Height and width of the input: larger and smaller images are resized to fit it.
        mean, std: Of each channel, for pixels between 0 and 1.

    Raises:
        ValueError: The scales of the pyramid do not fit the model.
    """
    backbone = SimpleFeaturePyramid(model, settings.channels, settings.scales)
    sizes = tuple((round(settings.anchor_scale * stride),) for stride in backbone.strides)
    anchors = AnchorGenerator(sizes, (_ASPECT_RATIOS,) * len(sizes))
    proposals = RegionProposalNetwork(
        anchors,
        ProposalHead(settings.channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=settings.anchor_samples,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2 * settings.proposals, "testing": settings.proposals},
        post_nms_top_n={"training": settings.proposals, "testing": settings.proposals},
        nms_thresh=0.7,
    )
    make = _cascade if settings.heads == "cascade" else _one_stage
    heads = make(backbone.strides[:-1], num_classes + 1, settings)
    return Detector(backbone, proposals, heads, FitTransform(image_shape, mean, std))


def _mask_parts(strides: list[int], num_classes: int, settings: DetectionConfig) -> dict[str, nn.Module]:
    if not settings.masks:
        return {}
    channels = settings.channels
    return {
        "mask_roi_pool": make_mask_pool(strides),
        "mask_head": make_mask_head(channels, settings.head_convolutions),
        "mask_predictor": MaskPredictor(channels, channels, num_classes),
    }


def _stage(
    strides: list[int],
    num_classes: int,
    settings: DetectionConfig,
    threshold: float,
    box_weights: tuple[float, ...],
    class_agnostic: bool,
    mask_parts: dict[str, nn.Module],
) -> RoIHeads:
    return RoIHeads(
        make_box_pool(strides),
        make_box_head(settings.channels, settings.head_convolutions, settings.head_features),
        BoxPredictor(settings.head_features, num_classes, class_agnostic),
        fg_iou_thresh=threshold,
        bg_iou_thresh=threshold,
        batch_size_per_image=settings.box_samples,
        positive_fraction=0.25,
        bbox_reg_weights=box_weights,
        score_thresh=settings.score_threshold,
        nms_thresh=0.5,
        detections_per_img=settings.max_detections,
        **mask_parts,
    )


def _one_stage(strides: list[int], num_classes: int, settings: DetectionConfig) -> nn.Module:
    masks = _mask_parts(strides, num_classes, settings)
    return _stage(strides, num_classes, settings, *_STAGES[0], class_agnostic=False, mask_parts=masks)


def _cascade(strides: list[int], num_classes: int, settings: DetectionConfig) -> nn.Module:
    stages = [_stage(strides, num_classes, settings, *stage, class_agnostic=True, mask_parts={}) for stage in _STAGES]
    return CascadeRoIHeads(stages, **_mask_parts(strides, num_classes, settings))
