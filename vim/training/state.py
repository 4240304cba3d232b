"""The state of a run: everything that changes as it trains, saved to and restored from a checkpoint."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from vim.checkpoints.io import CheckpointError, load_into, rng_state, set_rng_state
from vim.config.load import check_resumable, config_from_dict, config_to_dict
from vim.config.schema import TrainConfig
from vim.runtime.distributed import Processes
from vim.tasks.task import Task
from vim.training.metrics import EpochMeter
from vim.training.optim import check_optimizer_state


@dataclasses.dataclass(slots=True)
class Position:
    """The position of a run in its epochs and steps, and its figures so far."""

    epoch: int = 0
    """Completed epochs."""
    updates: int = 0
    """Completed optimizer steps of the current epoch."""
    step: int = 0
    """Completed optimizer steps of the whole run, skipped ones included."""
    skipped_in_a_row: int = 0
    """Steps skipped just before this one, because the loss or its gradient was not finite."""
    meter: dict[str, float] | None = None
    """Sums of the current epoch; see `EpochMeter.state`."""
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Figures of the completed epochs, one row each."""
    best: dict[str, Any] | None = None
    """Best held-out figures so far: `epoch`, `weights` (`raw` or `ema`), and the headline figures of the task."""

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], updates_per_epoch: int, task: Task) -> "Position":
        """Return a saved position, checked.

        Args:
            saved: The fields by name.
            updates_per_epoch: Optimizer steps in an epoch.
            task: The task of the run, which names its figures.

        Raises:
            ValueError: No run of this task can be at the position.
            TypeError: A field is unknown or has a wrong type.
        """
        position = cls(**saved)
        for name in ("epoch", "updates", "step", "skipped_in_a_row"):
            value = getattr(position, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"position.{name} must be a whole number >= 0, got {value!r}")
        if position.updates > updates_per_epoch:
            raise ValueError(f"position.updates must be <= {updates_per_epoch}, got {position.updates}")
        EpochMeter(task.sums, position.meter)
        first = position.history[0].keys() if position.history else set()
        rows = [{"epoch", "step"} <= row.keys() and row.keys() == first for row in position.history]
        if len(rows) != position.epoch or not all(rows):
            raise ValueError(
                f"position.history must have a row of the same figures for each of {position.epoch} epochs"
            )
        best = position.best or {}
        if position.epoch > 0 and not all(
            isinstance(best.get(name), (int, float)) for name in ("epoch", *task.headline)
        ):
            raise ValueError(f"position.best must hold the best figures so far, got {position.best!r}")
        return position


class RunState:
    """Weights, averaged weights, optimizer, gradient scale, random generators and position of a run.

    Args:
        config: The settings of the run.
        task: The task of the run.
        model: The model, on its device.
        ema: The averaged weights, or `None`.
        optimizer: The optimizer of the model.
        scaler: The gradient scaler.
        updates_per_epoch: Optimizer steps in an epoch.
        processes: The processes that train together; each has random generators of its own.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        model: nn.Module,
        ema: ModelEmaV3 | None,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        updates_per_epoch: int,
        processes: Processes,
    ) -> None:
        self.model, self.ema, self.optimizer, self.scaler = model, ema, optimizer, scaler
        self.position = Position()
        self._config, self._task = config, task
        self._updates_per_epoch, self._processes = updates_per_epoch, processes

    def weights_dict(self) -> dict[str, Any]:
        """Return the part of a checkpoint that is needed to use the model: settings, task and weights."""
        return {
            "config": config_to_dict(self._config),
            **self._task.state_dict(),
            "model": self.model.state_dict(),
            "model_ema": self.ema.module.state_dict() if self.ema is not None else None,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return everything that is needed to resume the run to the bit; every process must call it."""
        return self.weights_dict() | {
            "position": dataclasses.asdict(self.position),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": self._processes.gather(rng_state()),
        }

    def load_state_dict(self, state: Mapping[str, Any], source: Path) -> None:
        """Restore what `state_dict` returned, in a run with the same settings.

        Args:
            state: The contents of a checkpoint.
            source: The file of the checkpoint, for messages.

        Raises:
            CheckpointError: The checkpoint has another model, other settings or other classes, or lacks something.
        """
        needed = {"config", "model", "model_ema", "position", "optimizer", "scaler", "rng", *self._task.state_dict()}
        missing = needed - set(state)
        if missing:
            raise CheckpointError(f"{source} cannot be resumed from: it lacks {min(missing)!r}")
        try:
            self._task.load_state_dict(state)
            load_into(self.model, state["model"], source)
            if self.ema is not None:
                load_into(self.ema.module, state["model_ema"] or {}, source)
            check_resumable(config_from_dict(state["config"], str(source)), self._config)
            self.optimizer.load_state_dict(state["optimizer"])
            check_optimizer_state(self.optimizer, self.model, self._config)
            self.scaler.load_state_dict(state["scaler"])
            self.position = Position.from_dict(state["position"], self._updates_per_epoch, self._task)
            generators = state["rng"]
            if len(generators) == self._processes.size:  # else each process keeps the generators that it started with
                set_rng_state(generators[self._processes.rank])
        except CheckpointError:
            raise
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise CheckpointError(f"{source} cannot be resumed from: {' '.join(str(error).split())}") from error
