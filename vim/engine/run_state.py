"""What a checkpoint holds of a run, and putting a run back to where a checkpoint left it."""

import dataclasses
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vim.checkpoints.io import CheckpointError, load_into, rng_state, set_rng_state
from vim.config.engine import SaveConfig
from vim.config.load import check_resumable, config_from_dict, config_to_dict

if TYPE_CHECKING:
    from vim.engine.trainer import Trainer


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
        CheckpointError: The checkpoint is that of another model or of other settings, or lacks something.
    """
    path = trainer.folder.last
    missing = {"config", "model", "model_ema", "position", "optimizer", "scaler", "rng"} - set(state)
    if missing:
        raise CheckpointError(f"{path} cannot be resumed from: it lacks {min(missing)!r}")
    load_into(trainer.model, state["model"], path)
    if trainer.ema is not None:
        load_into(trainer.ema.module, state["model_ema"] or {}, path)
    try:
        check_resumable(config_from_dict(state["config"], str(path)), trainer.config)
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.scaler.load_state_dict(state["scaler"])
        trainer.position = Position(**state["position"])
        states, rank = state["rng"], trainer.processes.rank
        if len(states) == trainer.processes.size:  # with another number each keeps the stream that it began
            set_rng_state(states[rank])
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be resumed from: {' '.join(str(error).split())}") from error
