"""Exact evaluation: every held-out image counts once, on any number of processes."""

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim.runtime.distributed import Processes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvalResult:
    """The figures of an evaluation."""

    loss: float
    """Mean cross-entropy, without label smoothing."""
    top1: float
    """Share of the images whose first guess is right, in percent."""
    top5: float | None
    """Share of the images with the right class in the first five guesses, in percent; `None` up to five classes."""
    count: int
    """Number of images."""


class EvaluationStopped(RuntimeError):
    """A process was asked to stop, and all processes have left the evaluation."""


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    processes: Processes | None = None,
    stop_asked: Callable[[], bool] = lambda: False,
    observe: Callable[[Tensor, Tensor], None] = lambda logits, labels: None,
) -> EvalResult:
    """Classify every image, and return loss and accuracy.

    Args:
        model: The model; it is in evaluation mode during the call.
        batches: The batches of this process: normalised images (batch, in_chans, height, width) and labels (batch,), on
            the model's device.
        autocast: Returns the context to run the model in.
        processes: The processes that share the images; each returns the figures of all. `None` is this one alone.
        stop_asked: Called after every batch; if it returns True in one process, all processes stop.
        observe: Called with the logits (batch, classes), float32, and the labels of every batch of this process.

    Raises:
        ValueError: There are no images.
        EvaluationStopped: A process was asked to stop.
    """
    was_training = model.training
    model.eval()
    totals: Tensor | None = None
    num_classes = 0
    for images, labels in batches:
        with autocast():
            logits = model(images)
        logits = logits.float()
        observe(logits, labels)
        batch_totals, num_classes = _totals(logits, labels), logits.shape[1]
        totals = batch_totals if totals is None else totals + batch_totals
        if stop_asked():
            break
    model.train(was_training)
    processes = processes or Processes()
    if totals is None:  # fewer images than processes
        device = next(iter(model.parameters()), torch.empty(0)).device
        totals = torch.zeros(4, dtype=_exact(device), device=device)
    stops = torch.tensor([float(stop_asked())], dtype=totals.dtype, device=totals.device)
    loss, top1, top5, count, stop = processes.sum(torch.cat([totals, stops])).tolist()
    if stop:
        raise EvaluationStopped("a process was asked to stop during evaluation")
    if count == 0:
        raise ValueError("evaluation needs at least one held-out image, got none")
    num_classes = max(processes.gather(num_classes))
    return EvalResult(
        loss=loss / count,
        top1=100 * top1 / count,
        top5=100 * top5 / count if num_classes > 5 else None,
        count=round(count),
    )


def _totals(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sums over a batch of the loss, the first hits and the hits among five, and the number of images."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = guesses == labels[:, None]  # (batch, at most 5)
    count = torch.full_like(losses, 1.0)
    exact = _exact(logits.device)
    return torch.stack([values.to(exact).sum() for values in (losses, hits[:, 0], hits, count)])


def _exact(device: torch.device) -> torch.dtype:
    """Return the dtype of the sums: float64 if the device supports it."""
    return torch.float32 if device.type == "mps" else torch.float64
