"""Evaluation counts every image once and says exactly how many were right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vim.inference.evaluation import evaluate


class Table(nn.Module):
    """Looks the logits of an image up by its only pixel."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images):
        return self.logits[images.flatten().long()]


def batches(labels, size):
    images = torch.arange(len(labels)).view(-1, 1, 1, 1)
    return list(zip(images.split(size), labels.split(size), strict=True))


def test_accuracy_and_loss_are_exact_over_uneven_batches():
    torch.manual_seed(0)
    logits, labels = torch.randn(103, 8), torch.randint(0, 8, (103,))
    result = evaluate(Table(logits), batches(labels, 10))
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert result.count == 103
    assert result.top1 == pytest.approx(100 * (ranks == 0).sum().item() / 103)
    assert result.top5 == pytest.approx(100 * (ranks < 5).sum().item() / 103)
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)


def test_top_5_is_left_out_where_it_says_nothing():
    assert evaluate(Table(torch.randn(6, 5)), batches(torch.zeros(6, dtype=torch.long), 4)).top5 is None


def test_the_model_is_evaluated_in_evaluation_mode_and_left_as_it_was():
    class Watch(Table):
        def forward(self, images):
            assert not self.training
            assert not torch.is_grad_enabled()
            return super().forward(images)

    model = Watch(torch.randn(4, 3)).train()
    evaluate(model, batches(torch.zeros(4, dtype=torch.long), 2))
    assert model.training
    model.eval()
    evaluate(model, batches(torch.zeros(4, dtype=torch.long), 2))
    assert not model.training


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="at least one held-out image"):
        evaluate(Table(torch.randn(4, 3)), [])
