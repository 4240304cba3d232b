"""Semantic segmentation: UPerNet's head on the pyramid of a Vision Mamba."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vim.layers.checks import check_kind
from vim.models.pyramid import PyramidNorm, VimPyramid
from vim.models.vision_mamba import Tap, VisionMamba

_AUX_LEVEL = 2  # the third of four
_LEVELS = 4


class Segmenter(nn.Module):
    """A backbone with UPerNet's head, and an auxiliary head that is used in training only.

    The heads are those of transformers, which are ports of mmsegmentation's, with the dropout that its port leaves out.

    Args:
        model: The backbone. Modules that no level needs are removed from it.
        num_classes: Number of classes.
        blocks: The block that feeds each of the four levels; `None` takes the last block of each quarter of the model.
        tap: See `VimPyramid`.
        norm: "batch" has the norms of the original. "group" has group norms everywhere, so that an image's result
            depends neither on the others in its batch nor on their number.
        channels: Channels of the head; `None` is the width of the backbone, as in the original.
        pool_scales: Sides of the grids of the pyramid pooling.
        dropout: Probability that a channel is dropped before the classifiers.
        aux_channels: Channels of the auxiliary head; `None` leaves it out.

    Shape:
        (batch, in_chans, height, width) -> in evaluation mode logits (batch, num_classes, height, width); in training
        mode the pair of logits at 1/4 of the size and, from the auxiliary head or `None`, at 1/16.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: An argument is out of range; the message names it.

    Source: Xiao et al. 2018, arXiv:1807.10221, for UPerNet; Zhu et al. 2024, arXiv:2401.09417, section 4.2.
    """

    def __init__(
        self,
        model: VisionMamba,
        num_classes: int,
        blocks: Sequence[int] | None = None,
        tap: Tap = "sum",
        norm: PyramidNorm = "group",
        channels: int | None = None,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        aux_channels: int | None = 256,
    ) -> None:
        super().__init__()
        if importlib.util.find_spec("transformers") is None:
            raise ModuleNotFoundError(
                'segmentation needs the package transformers: pip install "vimamba[dense]"', name="transformers"
            )
        from transformers import UperNetConfig
        from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

        check_kind("norm", norm, ("group", "batch"))
        if num_classes < 2:
            raise ValueError(f"num_classes must be >= 2, got {num_classes}")
        self.num_classes = num_classes
        self.backbone = VimPyramid(model, blocks=blocks, tap=tap, norm=norm)
        width = [model.embed_dim] * _LEVELS
        settings: dict[str, Any] = {
            "hidden_size": channels or model.embed_dim,
            "pool_scales": list(pool_scales),
            "num_labels": num_classes,
            "auxiliary_channels": aux_channels or 0,
            "auxiliary_num_convs": 1,
        }
        config = UperNetConfig(**settings)
        self.head = UperNetHead(config, width)
        self.aux_head = UperNetFCNHead(config, width, _AUX_LEVEL) if aux_channels else None
        for head in (self.head, self.aux_head):
            if head is not None:
                _prepare(head, norm, dropout)
        self.to(next(model.parameters()))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """Return logits at the size of the images, or in training mode the logits of both heads."""
        maps = self.backbone(x)
        logits = self.head(maps)
        if not self.training:
            return F.interpolate(logits, x.shape[-2:], mode="bilinear", align_corners=False)
        return logits, None if self.aux_head is None else self.aux_head(maps)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters of the backbone that do not decay, besides one-dimensional ones."""
        return {f"backbone.model.{name}" for name in self.backbone.model.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Return patterns that assign parameters to layers, for layer-wise learning rates; the heads come last."""
        stem = "cls_token", "pos_embed", "patch_embed", "rope"
        return {
            "stem": "|".join(rf"^backbone\.model\.{name}" for name in stem),
            "blocks": r"^backbone\.model\.layers\.(\d+)",  # what matches nothing comes after the last block
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks of the backbone in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)


def _prepare(head: nn.Module, norm: PyramidNorm, dropout: float) -> None:
    """Initialise a head as mmsegmentation does, put dropout before its classifier, and choose its norms."""
    for module in list(head.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d):
                nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(child, nn.BatchNorm2d) and norm == "group":
                setattr(module, name, nn.GroupNorm(1, child.num_features))
    classifier = head.get_submodule("classifier")
    assert isinstance(classifier, nn.Conv2d)
    nn.init.normal_(classifier.weight, std=0.01)
    assert classifier.bias is not None
    nn.init.zeros_(classifier.bias)
    head.classifier = nn.Sequential(nn.Dropout2d(dropout), classifier)
