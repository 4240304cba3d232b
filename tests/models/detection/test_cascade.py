"""The cascade: thresholds, box coders, refinement, scores and gradients of its stages."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.ops import box_iou

from tests.models.detection.test_detector import CASCADE, tiny
from vim.models.detection import cascade

TRUTH = torch.tensor([[0.0, 0.0, 40.0, 40.0]])
SHAPES = [(64, 96)]


@pytest.fixture
def heads():
    """Cascade heads for three classes, whose boxes stay where they are."""
    heads = tiny(CASCADE).roi_heads.train()
    for stage in heads.stages:
        nn.init.zeros_(stage.box_predictor.bbox_pred.weight)
        nn.init.zeros_(stage.box_predictor.bbox_pred.bias)
    return heads


def features():
    torch.manual_seed(1)
    return {str(index): torch.randn(1, 16, 16 >> index, 24 >> index) for index in range(4)}


def target():
    masks = torch.zeros(1, 64, 96, dtype=torch.uint8)
    masks[0, :40, :40] = 1
    return {"boxes": TRUTH, "labels": torch.tensor([2]), "masks": masks}


def proposals_with(*overlaps):
    """Return boxes within the true one, with these IoU to it."""
    boxes = torch.stack([torch.tensor([0.0, 0.0, 40.0, 40.0 * overlap]) for overlap in overlaps])
    assert box_iou(TRUTH, boxes)[0].tolist() == pytest.approx(overlaps)
    return [boxes]


def watch_losses(monkeypatch):
    """Record the labels and the box targets of every stage."""
    seen = []
    original = cascade.fastrcnn_loss

    def recorded(logits, shifts, labels, targets):
        seen.append((labels, targets))
        return original(logits, shifts, labels, targets)

    monkeypatch.setattr(cascade, "fastrcnn_loss", recorded)
    return seen


def test_each_stage_asks_for_more_overlap(heads, monkeypatch):
    seen = watch_losses(monkeypatch)
    heads(features(), proposals_with(0.45, 0.55, 0.65, 0.75), SHAPES, [target()])
    positives = [int((labels[0] == 2).sum()) for labels, _ in seen]
    assert positives == [4, 3, 2]  # the true box is a proposal too
    assert all(set(labels[0].tolist()) <= {0, 2} and len(labels[0]) == 5 for labels, _ in seen)


def test_box_targets_are_scaled_by_the_weights_of_their_stage(heads, monkeypatch):
    seen = watch_losses(monkeypatch)
    heads(features(), proposals_with(0.75), SHAPES, [target()])
    own = [targets[0][(labels[0] == 2) & (targets[0].abs().sum(dim=1) > 1e-4)] for labels, targets in seen]
    center, height = (20 - 15) / 30, torch.tensor(4 / 3).log().item()  # relative to the proposal
    for (x, y, w, h), shifts in zip([(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)], own, strict=True):
        torch.testing.assert_close(shifts, torch.tensor([[x * 0.0, y * center, w * 0.0, h * height]]))


def test_each_stage_starts_from_the_boxes_of_the_one_before(heads):
    # Every stage moves a box down by a tenth of its height, in the units of its own coder.
    for stage, weight in zip(heads.stages, (10.0, 20.0, 30.0), strict=True):
        stage.box_predictor.bbox_pred.bias.data = torch.tensor([0.0, 0.1 * weight, 0.0, 0.0])
        stage.score_thresh = 0.0
    (result,), losses = heads.eval()(features(), [torch.tensor([[10.0, 10.0, 30.0, 20.0]])], SHAPES)
    assert losses == {}
    torch.testing.assert_close(result["boxes"], torch.tensor([[10.0, 13.0, 30.0, 23.0]] * 3))


def test_refined_boxes_carry_no_gradient_and_stay_in_the_image(heads):
    for stage in heads.stages:
        stage.box_predictor.bbox_pred.bias.data = torch.tensor([0.0, 100.0, 0.0, 0.0])
    shifts = torch.full((1, 16), 100.0, requires_grad=True)
    (boxes,) = cascade._refine(heads.stages[0], shifts, [TRUTH], SHAPES)
    assert not boxes.requires_grad
    assert (boxes <= torch.tensor([96.0, 64.0, 96.0, 64.0])).all()
    losses = heads(features(), proposals_with(0.75), SHAPES, [target()])[1]
    assert all(loss.isfinite() for loss in losses.values())  # later stages have no boxes left
    assert losses["loss_classifier_3"] == 0


def test_scores_are_the_mean_of_the_probabilities_of_all_stages(heads):
    logits = torch.tensor([[0.0, 5.0, 1.0, -1.0], [2.0, 0.0, 0.0, 0.0], [0.0, 1.0, 3.0, 0.0]])
    for stage, own in zip(heads.stages, logits, strict=True):
        nn.init.zeros_(stage.box_predictor.cls_score.weight)
        stage.box_predictor.cls_score.bias.data = own
        stage.score_thresh = 0.0
    (result,), _ = heads.eval()(features(), [TRUTH], SHAPES)
    expected = logits.softmax(dim=1).mean(dim=0)[1:]
    found = dict(zip(result["labels"].tolist(), result["scores"], strict=True))
    torch.testing.assert_close(torch.stack([found[label] for label in (1, 2, 3)]), expected)


def test_the_features_get_a_third_of_the_gradient_of_the_stages(heads):
    heads.mask_roi_pool = None
    maps = {name: level.requires_grad_() for name, level in features().items()}
    stage = heads.stages[0]

    def gradient(run):
        logits, _ = run()
        return torch.autograd.grad(logits.square().sum(), maps["0"])[0]

    scaled = gradient(lambda: heads._run_stage(stage, maps, [TRUTH], SHAPES))
    plain = gradient(lambda: stage.box_predictor(stage.box_head(stage.box_roi_pool(maps, [TRUTH], SHAPES))))
    assert plain.abs().max() > 0
    torch.testing.assert_close(scaled, plain / 3)


def test_training_needs_targets(heads):
    with pytest.raises(ValueError, match="targets must be given in training"):
        heads(features(), [TRUTH], SHAPES)
