"""The checkpoints of a run: the last one to resume from, and the best one to use."""

import time
from typing import Any

from vim.checkpoints.io import save_checkpoint, save_weights
from vim.config.run import SaveConfig
from vim.config.schema import BestBy, TrainConfig
from vim.runtime.distributed import Processes
from vim.tasks.task import Evaluation, Figures, Task
from vim.training.metrics import EpochMeter
from vim.training.nonfinite import check_weights_finite
from vim.training.run_folder import RunFolder
from vim.training.state import RunState


class SaveClock:
    """A clock that tells when the next checkpoint within an epoch is due.

    Args:
        config: The settings of the intervals.
    """

    def __init__(self, config: SaveConfig) -> None:
        self._config = config
        self._saved = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Return True if a checkpoint should follow the optimizer step, counted from 1 over the whole run."""
        steps, minutes = self._config.steps, self._config.minutes
        by_steps = steps is not None and step % steps == 0
        return by_steps or (minutes is not None and time.monotonic() - self._saved >= 60 * minutes)

    def restart(self) -> None:
        """Count the minutes from now."""
        self._saved = time.monotonic()


class Saver:
    """Writes the checkpoints of a run; every process must call its methods, and the main one writes.

    Args:
        config: The settings of the run.
        folder: The folder of the run.
        task: The task of the run.
        state: The state of the run.
        processes: The processes that train together.
    """

    def __init__(
        self, config: TrainConfig, folder: RunFolder, task: Task, state: RunState, processes: Processes
    ) -> None:
        self._config, self._folder, self._task = config, folder, task
        self._state, self._processes = state, processes
        self._clock = SaveClock(config.save)

    def is_due(self) -> bool:
        """Return True if this is the main process and a checkpoint should follow the current optimizer step."""
        return self._processes.is_main and self._clock.is_due(self._state.position.step + 1)

    def save_epoch(self, raw: Evaluation, averaged: Evaluation | None) -> None:
        """Write the last checkpoint after an epoch, and the best one if the epoch is the best so far.

        Args:
            raw: The evaluation of the weights.
            averaged: The evaluation of the averaged weights, if there are any.

        Raises:
            NonFiniteError: A weight is infinite or not a number. Nothing is written.
        """
        position, score = self._state.position, self._task.score
        weights, result = self._choose(self._config.best_by, raw, averaged)
        figures = {"epoch": position.epoch, "weights": weights} | {name: result[name] for name in self._task.headline}
        improved = position.best is None or score(result) > score(position.best)
        if improved:
            position.best = figures
        header: dict[str, Any] = {"epoch": position.epoch, "weights": weights, "figures": figures}
        check_weights_finite(self._state.model, position.step)
        if improved and self._processes.is_main:
            contents = header | self._state.weights_dict()
            save_checkpoint(self._folder.best, contents)
            chosen = contents["model_ema" if weights == "ema" else "model"]
            save_weights(self._folder.best_weights, chosen, self._task.weights_metadata())
        self._write_last(header)

    def save_within_epoch(self, meter: EpochMeter) -> None:
        """Write the last checkpoint in the middle of an epoch.

        Args:
            meter: The sums of the epoch so far.

        Raises:
            NonFiniteError: A weight is infinite or not a number. Nothing is written.
        """
        position = self._state.position
        check_weights_finite(self._state.model, position.step)
        position.meter = meter.state()
        weights = position.best["weights"] if position.best is not None else "raw"
        self._write_last({"epoch": position.epoch, "weights": weights, "figures": None})

    def _write_last(self, header: dict[str, Any]) -> None:
        contents = header | self._state.state_dict()
        if self._processes.is_main:
            save_checkpoint(self._folder.last, contents)
        self._clock.restart()

    def _choose(self, best_by: BestBy, raw: Evaluation, averaged: Evaluation | None) -> tuple[str, Figures]:
        """Return the weights that an epoch is judged by, and their figures."""
        if averaged is None or best_by == "raw":
            return "raw", raw.figures
        if best_by == "ema":
            return "ema", averaged.figures
        choices = [("raw", raw.figures), ("ema", averaged.figures)]
        return max(choices, key=lambda choice: self._task.score(choice[1]))
