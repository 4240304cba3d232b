"""Figures of an epoch, summed over its optimizer steps and all processes."""

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch

from vim.inference.evaluation import EvalResult

_SUMS = ("steps", "images", "loss", "hits", "grad_norm", "waited", "skipped", "unreadable")


class EpochMeter:
    """Sums over the optimizer steps of an epoch, in a whole or in the parts before and after an interruption.

    Args:
        state: What `state` of an earlier part returned.
    """

    def __init__(self, state: Mapping[str, float] | None = None) -> None:
        sums = dict.fromkeys((*_SUMS, "seconds"), 0) if state is None else dict(state)
        self.steps = int(sums["steps"])
        """Optimizer steps taken."""
        self.images = int(sums["images"])
        """Images in them."""
        self.loss = float(sums["loss"])
        """Sum over the steps of the mean loss."""
        self.hits = float(sums["hits"])
        """Images whose class was the first guess."""
        self.grad_norm = float(sums["grad_norm"])
        """Sum over the steps of the norm of the gradient before clipping."""
        self.waited = float(sums["waited"])
        """Seconds that a process waited for images, on average."""
        self.skipped = int(sums["skipped"])
        """Steps that were not taken, since the loss or its gradient was not finite."""
        self.unreadable = int(sums["unreadable"])
        """Images that could not be read, and others stood in for."""
        self._last = (float("nan"), float("nan"))
        self._began = time.perf_counter() - float(sums["seconds"])

    @property
    def seconds(self) -> float:
        """Seconds of training in this epoch."""
        return time.perf_counter() - self._began

    def state(self) -> dict[str, float]:
        """Return the sums, for a checkpoint in the middle of the epoch."""
        return {name: getattr(self, name) for name in _SUMS} | {"seconds": self.seconds}

    def add(self, images: int, loss: float, hits: float, grad_norm: float) -> None:
        """Count a step that was taken."""
        self.steps += 1
        self.images += images
        self.loss += loss
        self.hits += hits
        self.grad_norm += grad_norm
        self._last = (loss, grad_norm)

    def last_step(self) -> dict[str, float]:
        """Return the figures of the last step that was taken, and the speed so far."""
        loss, grad_norm = self._last
        seconds = self.seconds
        return {
            "loss": loss,
            "grad_norm": grad_norm,
            "images_per_second": self.images / seconds,
            "data_wait_percent": 100 * self.waited / seconds,
        }

    @property
    def mean_loss(self) -> float:
        """Mean loss; NaN before the first step."""
        return self.loss / self.steps if self.steps else float("nan")

    @property
    def top1(self) -> float:
        """Training accuracy in percent; NaN before the first step."""
        return 100 * self.hits / self.images if self.images else float("nan")

    def row(
        self,
        seconds: float,
        memory_gib: float | None,
        raw: EvalResult,
        averaged: EvalResult | None,
        val_unreadable: int,
    ) -> dict[str, Any]:
        """Return the figures of the whole epoch by name, as in `summary.csv`.

        Args:
            seconds: What `seconds` was when training ended and evaluation began.
            memory_gib: The most memory used so far.
            raw: The evaluation of the weights.
            averaged: The evaluation of the averaged weights, if there are any.
            val_unreadable: Held-out images that could not be read, and are not in the evaluation.
        """
        return {
            "train_loss": self.mean_loss,
            "train_top1": self.top1,
            "val_loss": raw.loss,
            "val_top1": raw.top1,
            "val_top5": raw.top5,
            "ema_loss": averaged.loss if averaged else None,
            "ema_top1": averaged.top1 if averaged else None,
            "ema_top5": averaged.top5 if averaged else None,
            "grad_norm": self.grad_norm / self.steps if self.steps else None,
            "skipped_steps": self.skipped,
            "images_per_second": self.images / seconds,
            "data_wait_percent": 100 * self.waited / seconds,
            "train_unreadable": self.unreadable,
            "val_unreadable": val_unreadable,
            "memory_gib": memory_gib,
            "seconds": self.seconds,
        }


def peak_memory_gib(device: torch.device) -> float | None:
    """Return the most memory used so far in GiB: of the GPU, or of this process; `None` on Windows, which lacks it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB elsewhere
