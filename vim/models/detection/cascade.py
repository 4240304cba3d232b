"""Cascade R-CNN: box heads in a row, each trained on the boxes of the one before with a stricter threshold."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import boxes as box_ops

Targets = list[dict[str, Tensor]]


class CascadeRoIHeads(nn.Module):
    """Region heads of Cascade Mask R-CNN, in place of torchvision's `RoIHeads`.

    Each stage is a `RoIHeads` with a threshold, a box coder, a box head and a class-agnostic predictor of its own. The
    first stage samples the proposals. Each later stage takes the boxes of the stage before, without sampling, and
    matches them again. At test time the probabilities of a final box are averaged over the heads of all stages.

    Masks are trained on the positive proposals of the first stage, and predicted in the final boxes.

    Args:
        stages: The stages, in their order. Their mask parts are not used.
        mask_roi_pool, mask_head, mask_predictor: See `RoIHeads`; `None` predicts no masks.

    Source: Cai and Vasconcelos 2018, arXiv:1712.00726, sections 4 and 5; the gradient scale and the box head are
    ViTDet's, Li et al. 2022, arXiv:2203.16527.
    """

    mask_roi_pool: Any
    mask_head: Any
    mask_predictor: Any

    def __init__(
        self,
        stages: Sequence[RoIHeads],
        mask_roi_pool: nn.Module | None = None,
        mask_head: nn.Module | None = None,
        mask_predictor: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.mask_roi_pool, self.mask_head, self.mask_predictor = mask_roi_pool, mask_head, mask_predictor

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return the detections of each image at test time, and the losses by name in training.

        Args:
            features: Maps by name, (batch, channels, rows, columns).
            proposals: Boxes of each image, (proposals, 4).
            image_shapes: Height and width of each image in pixels.
            targets: `boxes`, `labels` and `masks` of each image, needed in training.
        """
        if self.training:
            if targets is None:
                raise ValueError("targets must be given in training, got None")
            return [], self._losses(features, proposals, image_shapes, targets)
        return self._detect(features, proposals, image_shapes), {}

    def _losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets,
    ) -> dict[str, Tensor]:
        first: RoIHeads = self.stages[0]
        proposals, matched, labels, shifts = first.select_training_samples(proposals, targets)
        losses = {}
        if self.mask_roi_pool is not None:
            losses["loss_mask"] = self._mask_loss(features, proposals, image_shapes, targets, matched, labels)
        for number, stage in enumerate(self.stages):
            if number > 0:
                proposals = [boxes[_has_area(boxes)] for boxes in proposals]
                labels, shifts = _match(stage, proposals, targets)
            logits, predicted = self._run_stage(stage, features, proposals, image_shapes)
            # A mean over no boxes would be NaN.
            class_loss, box_loss = (
                fastrcnn_loss(logits, predicted, labels, shifts)
                if len(logits)
                else (logits.sum() * 0, predicted.sum() * 0)
            )
            losses[f"loss_classifier_{number + 1}"] = class_loss
            losses[f"loss_box_reg_{number + 1}"] = box_loss
            proposals = _refine(stage, predicted, proposals, image_shapes)
        return losses

    def _detect(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        probabilities: list[Tensor] = []
        for number, stage in enumerate(self.stages):
            logits, shifts = self._run_stage(stage, features, proposals, image_shapes)
            probabilities.append(logits.softmax(dim=-1))
            if number < len(self.stages) - 1:
                proposals = _refine(stage, shifts, proposals, image_shapes)
        # `postprocess_detections` takes logits: the softmax of the logarithms is the mean itself.
        mean = torch.stack(probabilities).mean(dim=0).log()
        last: Any = self.stages[-1]
        found = last.postprocess_detections(mean, shifts, proposals, image_shapes)
        results = [
            {"boxes": boxes, "scores": scores, "labels": labels} for boxes, scores, labels in zip(*found, strict=True)
        ]
        if self.mask_roi_pool is not None:
            logits = self._mask_logits(features, [result["boxes"] for result in results], image_shapes)
            masks = maskrcnn_inference(logits, [result["labels"] for result in results])
            for result, mask in zip(results, masks, strict=True):
                result["masks"] = mask
        return results

    def _run_stage(
        self,
        stage: RoIHeads,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[Tensor, Tensor]:
        """Return the logits and box shifts of a stage for all proposals."""
        pooled = stage.box_roi_pool(features, proposals, image_shapes)
        if pooled.requires_grad:  # all stages together move the features as much as one
            pooled.register_hook(lambda gradient: gradient / len(self.stages))
        return stage.box_predictor(stage.box_head(pooled))

    def _mask_loss(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets,
        matched: list[Tensor],
        labels: list[Tensor],
    ) -> Tensor:
        positive = [label > 0 for label in labels]
        boxes = [own[keep] for own, keep in zip(proposals, positive, strict=True)]
        indices = [own[keep] for own, keep in zip(matched, positive, strict=True)]
        logits = self._mask_logits(features, boxes, image_shapes)
        masks, classes = [target["masks"] for target in targets], [target["labels"] for target in targets]
        return maskrcnn_loss(logits, boxes, masks, classes, indices)

    def _mask_logits(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))


def _refine(
    stage: RoIHeads, shifts: Tensor, proposals: list[Tensor], image_shapes: list[tuple[int, int]]
) -> list[Tensor]:
    """Return the boxes that a stage makes of its proposals, within their images; no gradient flows through them."""
    decoded = stage.box_coder.decode(shifts.detach(), proposals).reshape(len(shifts), shifts.shape[1] // 4, 4)
    boxes = decoded[:, 0].split([len(own) for own in proposals])  # the same for each class
    return [box_ops.clip_boxes_to_image(own, shape) for own, shape in zip(boxes, image_shapes, strict=True)]


def _match(stage: RoIHeads, proposals: list[Tensor], targets: Targets) -> tuple[list[Tensor], list[Tensor]]:
    """Return labels and box shifts of a later stage's proposals, by the threshold of that stage."""
    labels, nearest = [], []
    for own, target in zip(proposals, targets, strict=True):
        truth = target["boxes"].to(own.dtype)
        if len(own) and len(truth):
            (index,), (label,) = stage.assign_targets_to_proposals([own], [truth], [target["labels"]])
            nearest.append(truth[index])
        else:  # torchvision's matcher refuses an image whose proposals have all left it
            label = own.new_zeros(len(own), dtype=torch.int64)
            nearest.append(torch.zeros_like(own))
        labels.append(label)
    return labels, list(stage.box_coder.encode(nearest, proposals))


def _has_area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
