"""What a checkpoint holds of a run, and putting a run back to where a checkpoint left it."""

import dataclasses
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vim.checkpoints.io import CheckpointError, load_into, rng_state, set_rng_state
from vim.config.load import check_resumable, config_from_dict, config_to_dict
from vim.config.run import SaveConfig
from vim.data.contents import class_changes
from vim.training.metrics import EpochMeter

if TYPE_CHECKING:
    from vim.training.trainer import Trainer


class SaveClock:
    """When the next checkpoint within an epoch is due.

    Args:
        config: How often.
    """

    def __init__(self, config: SaveConfig) -> None:
        self._config = config
        self._saved = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint should follow the optimizer step, counted from 1 over the whole run."""
        steps, minutes = self._config.steps, self._config.minutes
        by_steps = steps is not None and step % steps == 0
        return by_steps or (minutes is not None and time.monotonic() - self._saved >= 60 * minutes)

    def restart(self) -> None:
        """Count the minutes from now."""
        self._saved = time.monotonic()


@dataclasses.dataclass(slots=True)
class Position:
    """Where a run is, and what it has found so far."""

    epoch: int = 0
    """Whole epochs done."""
    updates: int = 0
    """Optimizer steps done in the epoch after them."""
    step: int = 0
    """Optimizer steps done in the whole run, those that were skipped among them."""
    skipped_in_a_row: int = 0
    """Steps just before this one that were skipped, since the loss or its gradient was not finite."""
    meter: dict[str, float] | None = None
    """The sums of the epoch that is not done; see `EpochMeter.state`."""
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Figures of the epochs done, one row each."""
    best: dict[str, Any] | None = None
    """The best held-out figures so far: epoch, weights (`raw` or `ema`), top1 and loss."""


def capture_weights(trainer: "Trainer") -> dict[str, Any]:
    """Return what `vim.predict` and timm need of a checkpoint."""
    return {
        "config": config_to_dict(trainer.config),
        "class_names": list(trainer.loaders.class_names),
        "model": trainer.model.state_dict(),
        "model_ema": trainer.ema.module.state_dict() if trainer.ema is not None else None,
    }


def capture_rest(trainer: "Trainer") -> dict[str, Any]:
    """Return what else it takes to carry the run on to the bit; every process must call it."""
    return {
        "position": dataclasses.asdict(trainer.position),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "rng": trainer.processes.gather(rng_state()),
    }


def restore(trainer: "Trainer", state: Mapping[str, Any]) -> None:
    """Put a run back to where a checkpoint left it.

    Args:
        trainer: A run with the same settings, not begun.
        state: What `capture_weights` and `capture_rest` returned.

    Raises:
        CheckpointError: The checkpoint has another model, other settings or other classes, or lacks something.
    """
    path = trainer.folder.last
    missing = {"config", "class_names", "model", "model_ema", "position", "optimizer", "scaler", "rng"} - set(state)
    if missing:
        raise CheckpointError(f"{path} cannot be resumed from: it lacks {min(missing)!r}")
    changes = class_changes(state["class_names"], trainer.loaders.class_names)
    if changes is not None:
        raise CheckpointError(
            f"{path} cannot be resumed from: the classes of the data are not what they were: {changes}, and their "
            "labels would mean others"
        )
    try:
        load_into(trainer.model, state["model"], path)
        if trainer.ema is not None:
            load_into(trainer.ema.module, state["model_ema"] or {}, path)
        check_resumable(config_from_dict(state["config"], str(path)), trainer.config)
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.scaler.load_state_dict(state["scaler"])
        trainer.position = _position(state["position"], trainer.updates_per_epoch)
        states, rank = state["rng"], trainer.processes.rank
        if len(states) == trainer.processes.size:  # with another number each keeps the stream that it began
            set_rng_state(states[rank])
    except CheckpointError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be resumed from: {' '.join(str(error).split())}") from error


def _position(saved: Mapping[str, Any], updates_per_epoch: int) -> Position:
    """Return a saved position, once it is one that a run can have."""
    position = Position(**saved)
    for name in ("epoch", "updates", "step", "skipped_in_a_row"):
        value = getattr(position, name)
        if type(value) is not int or value < 0:
            raise ValueError(f"position.{name} must be a whole number >= 0, got {value!r}")
    if position.updates > updates_per_epoch:
        raise ValueError(f"position.updates must be <= {updates_per_epoch}, got {position.updates}")
    EpochMeter(position.meter)
    columns = [{"epoch", "step"} <= row.keys() and row.keys() == position.history[0].keys() for row in position.history]
    if len(columns) != position.epoch or not all(columns):
        raise ValueError(f"position.history must have a row of the same figures for each of {position.epoch} epochs")
    best = position.best or {}
    if position.epoch > 0 and not all(isinstance(best.get(name), (int, float)) for name in ("epoch", "top1", "loss")):
        raise ValueError(f"position.best must hold the best figures so far, got {position.best!r}")
    return position
