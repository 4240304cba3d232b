"""Figures of segmentation: torchmetrics' own, and the same however images are cut and shared."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from tests.tiny_runs import TINY_SEGMENTER, tiny_config
from vim.data.masks import NO_CLASS
from vim.inference.mask_evaluation import class_figures, evaluate_masks
from vim.inference.mask_predictor import MaskPredictor

CPU = torch.device("cpu")
CLASSES = 4


class ByPixel(nn.Module):
    """A model that looks at one pixel at a time, so that windows make no difference."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, CLASSES, 1)

    def forward(self, x):
        return 4 * self.conv(x)


def make_pairs(sizes=((32, 32), (50, 33), (20, 70))):
    torch.manual_seed(1)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    masks = [torch.randint(0, CLASSES, size, dtype=torch.uint8) for size in sizes]
    for mask in masks:
        mask[:, ::7] = NO_CLASS
    return images, masks


def predictor(model, **changes):
    return MaskPredictor(model, tiny_config(**{**TINY_SEGMENTER, **changes}), CPU)


def evaluate(model, pairs, classes=CLASSES, **changes):
    images, masks = pairs
    return evaluate_masks(model, predictor(model, **changes), [(images, masks, [])], classes)


def test_the_figures_are_those_of_torchmetrics():
    model, (images, masks) = ByPixel().eval(), make_pairs()
    result = evaluate(model, (images, masks))
    figures = result.figures()
    mean, std = 0.4 * 255, 0.2 * 255
    logits = [model((image.float()[None] - mean) / std)[0] for image in images]
    flat = torch.cat([part.flatten(1) for part in logits], dim=1).T
    truth = torch.cat([mask.flatten() for mask in masks]).long()
    options = {"num_classes": CLASSES, "ignore_index": NO_CLASS}
    for name, metric in (
        ("miou", MulticlassJaccardIndex(**options)),
        ("macc", MulticlassAccuracy(**options, average="macro")),
        ("aacc", MulticlassAccuracy(**options, average="micro")),
    ):
        assert figures[name] == pytest.approx(100 * float(metric(flat, truth)), rel=1e-5), name
    assert figures["loss"] == pytest.approx(float(F.cross_entropy(flat, truth, ignore_index=NO_CLASS)), rel=1e-5)
    assert int(result.confusion.sum()) == int((truth != NO_CLASS).sum())
    assert result.count == 3


def test_a_class_that_is_nowhere_does_not_count_as_in_torchmetrics():
    confusion = torch.tensor([[5, 1, 0], [2, 4, 0], [0, 0, 0]])
    ious, accuracies = class_figures(confusion)
    assert ious[:2].tolist() == pytest.approx([5 / 8, 4 / 7])
    assert ious.isnan().tolist() == accuracies.isnan().tolist() == [False, False, True]
    metric = MulticlassJaccardIndex(num_classes=3)
    truth = torch.tensor([0] * 6 + [1] * 6)
    guesses = torch.tensor([0] * 5 + [1] + [0] * 2 + [1] * 4)
    assert float(ious.nanmean()) == pytest.approx(float(metric(guesses, truth)))


def test_images_of_one_size_give_the_same_alone_and_together():
    model = ByPixel().eval()
    pairs = make_pairs(((32, 32), (32, 32), (32, 32)))
    together = evaluate(model, pairs)
    alone = [evaluate(model, ([image], [mask])) for image, mask in zip(*pairs, strict=True)]
    assert torch.equal(together.confusion, sum(result.confusion for result in alone))


def test_flips_and_scales_average_probabilities():
    model, (images, _) = ByPixel().eval(), make_pairs(((32, 40),))
    plain = torch.cat([rows for _, rows in next(predictor(model).scores(images))], dim=1)
    flipped = torch.cat(
        [rows for _, rows in next(predictor(model, segmentation__test_flip=True).scores(images))], dim=1
    )
    torch.testing.assert_close(flipped.exp(), plain.softmax(dim=0))  # this model is the same in a mirror
    scales = predictor(model, segmentation__test_scales=(0.5, 1.0))
    ((top, both),) = next(scales.scores(images))
    assert (top, both.shape) == (0, plain.shape)
    torch.testing.assert_close(both.exp().sum(dim=0), torch.ones(32, 40))


def test_an_image_resized_for_the_model_gets_a_mask_of_its_own_size():
    model, (images, masks) = ByPixel().eval(), make_pairs(((80, 50),))
    labels = predictor(model, segmentation__short_side=32).labels(images[0])
    assert labels.shape == masks[0].shape


def test_masks_without_any_class_are_refused():
    images, masks = make_pairs(((32, 32),))
    with pytest.raises(ValueError, match="at least one held-out pixel with a class"):
        evaluate(ByPixel(), (images, [torch.full_like(masks[0], NO_CLASS)]))


def test_the_model_is_in_evaluation_mode_during_the_call_only():
    model, modes = ByPixel().train(), []
    model.register_forward_hook(lambda module, inputs, output: modes.append(module.training))
    evaluate(model, make_pairs())
    assert model.training
    assert not any(modes)
