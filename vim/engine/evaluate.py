"""Exact evaluation: every held-out image counts once."""

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvalResult:
    """What an evaluation found."""

    loss: float
    """Mean cross-entropy, without label smoothing."""
    top1: float
    """Share of the images whose class is the first guess, in percent."""
    top5: float | None
    """Share of the images whose class is among the first five guesses, in percent; `None` with five classes or less."""
    count: int
    """Number of images."""


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> EvalResult:
    """Classify every image and count.

    Args:
        model: Put into evaluation mode for the time of the call.
        batches: Normalised images (batch, in_chans, height, width) and labels (batch,), on the model's device.
        autocast: Makes the context to run the model in.

    Raises:
        ValueError: There are no images.
    """
    was_training = model.training
    model.eval()
    count = num_classes = 0
    totals: Tensor | None = None
    for images, labels in batches:
        with autocast():
            logits = model(images)
        batch_totals, num_classes = _totals(logits.float(), labels), logits.shape[1]
        totals = batch_totals if totals is None else totals + batch_totals
        count += len(labels)
    model.train(was_training)
    if totals is None:
        raise ValueError("evaluation needs at least one held-out image, got none")
    loss, top1, top5 = (totals / count).tolist()
    return EvalResult(loss=loss, top1=100 * top1, top5=100 * top5 if num_classes > 5 else None, count=count)


def _totals(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sums over a batch of the loss, the first hits and the hits among five; float64 where there is any."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = guesses == labels[:, None]  # (batch, at most 5)
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    return torch.stack([losses.to(exact).sum(), hits[:, 0].to(exact).sum(), hits.to(exact).sum()])
