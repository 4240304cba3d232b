"""Figures of an epoch, summed over its optimizer steps and all processes."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vim.tasks.task import Evaluation

_SUMS = ("steps", "images", "loss", "grad_norm", "waited", "skipped", "unreadable")


class EpochMeter:
    """Sums over the optimizer steps of an epoch, also across an interruption of the run.

    Args:
        task_sums: Names of the counts of the task; see `Task.sums`.
        state: The sums of the part before the interruption, as `state` returned them.
    """

    def __init__(self, task_sums: Sequence[str], state: Mapping[str, float] | None = None) -> None:
        sums = dict.fromkeys((*_SUMS, *task_sums, "seconds"), 0) if state is None else dict(state)
        self.steps = int(sums["steps"])
        """Optimizer steps taken."""
        self.images = int(sums["images"])
        """Images in these steps."""
        self.loss = float(sums["loss"])
        """Sum over the steps of the mean loss."""
        self.task_sums = {name: float(sums[name]) for name in task_sums}
        """Counts of the task."""
        self.grad_norm = float(sums["grad_norm"])
        """Sum over the steps of the gradient norm before clipping."""
        self.waited = float(sums["waited"])
        """Seconds that a process waited for images, on average."""
        self.skipped = int(sums["skipped"])
        """Steps skipped because the loss or its gradient was not finite."""
        self.unreadable = int(sums["unreadable"])
        """Images that could not be read and were replaced by others."""
        self._last = (float("nan"), float("nan"))
        self._began = time.perf_counter() - float(sums["seconds"])

    @property
    def seconds(self) -> float:
        """Seconds of training in this epoch."""
        return time.perf_counter() - self._began

    def state(self) -> dict[str, float]:
        """Return the sums, for a checkpoint in the middle of the epoch."""
        return {name: getattr(self, name) for name in _SUMS} | self.task_sums | {"seconds": self.seconds}

    def add(self, images: int, loss: float, task_sums: Sequence[float], grad_norm: float) -> None:
        """Count a step that was taken.

        Args:
            images: Images of the step.
            loss: Mean loss of the step.
            task_sums: Counts of the task, in the order of their names.
            grad_norm: Norm of the gradient before clipping.
        """
        self.steps += 1
        self.images += images
        self.loss += loss
        for name, value in zip(self.task_sums, task_sums, strict=True):
            self.task_sums[name] += value
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

    def row(
        self,
        seconds: float,
        memory_gib: float | None,
        training: Mapping[str, float],
        raw: Evaluation,
        averaged: Evaluation | None,
    ) -> dict[str, Any]:
        """Return the figures of the whole epoch by name, as in `summary.csv`.

        Args:
            seconds: The value of `seconds` when training ended and evaluation began.
            memory_gib: The peak memory so far.
            training: The training figures of the task.
            raw: The evaluation of the weights.
            averaged: The evaluation of the averaged weights, if there are any.
        """
        return {
            "train_loss": self.mean_loss,
            **{f"train_{name}": value for name, value in training.items()},
            **{f"val_{name}": value for name, value in raw.figures.items()},
            **{f"ema_{name}": averaged.figures[name] if averaged else None for name in raw.figures},
            "grad_norm": self.grad_norm / self.steps if self.steps else None,
            "skipped_steps": self.skipped,
            "images_per_second": self.images / seconds,
            "data_wait_percent": 100 * self.waited / seconds,
            "train_unreadable": self.unreadable,
            "val_unreadable": raw.unreadable,
            "memory_gib": memory_gib,
            "seconds": self.seconds,
        }


def peak_memory_gib(device: torch.device) -> float | None:
    """Return the peak memory in GiB, of the GPU or of this process; `None` on Windows, which does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB elsewhere
