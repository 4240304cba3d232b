"""The loss of a batch against its formula, with smoothing, mixing and autocast."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.tiny_runs import change, tiny_config
from vim.tasks.classification_loss import ClassificationLoss

CPU = torch.device("cpu")
CLASSES = ("a", "b", "c", "d", "e")


class Fixed(nn.Module):
    """Gives the same logits for any images."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images):
        return self.logits


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_cross_entropy_with_smoothed_labels(smoothing):
    logits, labels = torch.randn(4, 5), torch.tensor([0, 4, 2, 2])
    loss_of = ClassificationLoss(tiny_config(loss__label_smoothing=smoothing), CLASSES[:5], CPU)
    loss, hits = loss_of(Fixed(logits), torch.zeros(4, 1, 2, 2), labels)
    targets = torch.full((4, 5), smoothing / 5)
    targets[torch.arange(4), labels] += 1 - smoothing
    assert loss.item() == pytest.approx(-(targets * logits.log_softmax(1)).sum(1).mean().item(), rel=1e-5)
    assert hits.item() == (logits.argmax(1) == labels).sum().item()


def test_mixup_blends_images_and_targets_by_the_same_share():
    np.random.seed(0)
    seen = {}

    class Watch(nn.Module):
        def forward(self, images):
            seen["images"] = images.clone()
            return logits

    logits, labels = torch.randn(2, 3), torch.tensor([0, 2])
    images = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
    config = tiny_config(augment__mixup=0.8, loss__label_smoothing=0.0)
    loss, hits = ClassificationLoss(config, CLASSES[:3], CPU)(Watch(), images, labels)
    share = 1 - seen["images"][0, 0, 0, 0].item()  # of its own image in the first
    assert 0 < share < 1
    assert seen["images"][1, 0, 0, 0].item() == pytest.approx(share)
    targets = torch.tensor([[share, 0, 1 - share], [1 - share, 0, share]])
    assert loss.item() == pytest.approx(-(targets * logits.log_softmax(1)).sum(1).mean().item(), rel=1e-5)
    assert hits.item() == (logits.argmax(1) == targets.argmax(1)).sum().item()


@pytest.mark.parametrize(("precision", "inside"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_model_runs_in_the_precision_asked_for_and_the_loss_in_float32(precision, inside):
    seen = {}

    class Watch(nn.Linear):
        def forward(self, images):
            result = super().forward(images.flatten(1))
            seen["dtype"] = result.dtype
            return result

    model = Watch(4, 3)
    loss_of = ClassificationLoss(tiny_config(precision=precision), CLASSES[:3], CPU)
    loss, _ = loss_of(model, torch.randn(2, 1, 2, 2), torch.tensor([0, 1]))
    assert (seen["dtype"], loss.dtype) == (inside, torch.float32)


def test_how_a_batch_is_mixed_is_a_function_of_the_seed_and_the_place():
    def mixed(place, seed=0):
        loss_of, images = (
            ClassificationLoss(tiny_config(augment__mixup=0.8, seed=seed), CLASSES[:3], CPU),
            torch.ones(2, 1, 4, 4),
        )
        images[0] = 0
        loss_of(Fixed(torch.zeros(2, 3)), images, torch.tensor([0, 2]), place)
        return images.flatten().tolist()

    np.random.seed(1)
    first = mixed((3, 7))
    np.random.seed(2)
    assert mixed((3, 7)) == first
    assert mixed((3, 8)) != first
    assert mixed((4, 7)) != first
    assert mixed((3, 7), seed=1) != first


def test_images_grow_to_their_full_size_in_multiples_and_the_model_sees_them_so():
    config = tiny_config(epochs=6, model__img_size=(32, 48), progressive__start_size=16, progressive__multiple=8)
    loss_of = ClassificationLoss(config, CLASSES, CPU)
    shapes = [loss_of.image_shape(epoch) for epoch in range(6)]
    assert shapes == [(16, 24), (16, 32), (24, 32), (24, 40), (32, 40), (32, 48)]
    seen = []

    class Watch(nn.Module):
        def forward(self, images):
            seen.append(tuple(images.shape))
            return torch.zeros(2, 5)

    for epoch in (0, 5):
        loss_of(Watch(), torch.randn(2, 1, 32, 48), torch.tensor([0, 1]), (epoch, 0))
    assert seen == [(2, 1, 16, 24), (2, 1, 32, 48)]
    early = ClassificationLoss(change(config, progressive__epochs=2), CLASSES, CPU)
    assert [early.image_shape(epoch) for epoch in range(4)] == [(16, 24), (24, 32), (32, 48), (32, 48)]
    assert ClassificationLoss(tiny_config(), CLASSES, CPU).image_shape(0) == (16, 16)
