"""Trackers that draw figures during a run: TensorBoard, Weights & Biases, MLflow."""

import importlib.util
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from vim.checkpoints.io import write_text
from vim.config.run import TrackerName

_logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """A program that records figures by name."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Record the figures of an optimizer step."""

    def close(self) -> None:
        """Flush the figures and close."""


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Check that the trackers are installed, except TensorBoard, the default, which may be missing.

    Raises:
        ModuleNotFoundError: A tracker is not installed; the message has the command that installs it.
    """
    for name in names:
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"log.trackers names {name!r}, which is not installed: pip install {name}")


def open_trackers(
    names: Sequence[TrackerName], folder: Path, settings: Mapping[str, Any], first_step: int = 0
) -> list[Tracker]:
    """Open the trackers of a run; a resumed run continues its records.

    Args:
        names: Names of the trackers.
        folder: Folder of the run; its `trackers.json` keeps the identifiers of the records.
        settings: The settings of the run by dotted name.
        first_step: Optimizer steps done before the run was resumed.
    """
    openers: dict[TrackerName, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
        "tensorboard": _TensorBoard,
        "wandb": _WeightsAndBiases,
        "mlflow": _MLflow,
    }
    trackers: list[Tracker] = []
    for name in names:
        if importlib.util.find_spec(name) is None:
            _logger.warning("%s is not installed: no figures are written for it", name)
        else:
            trackers.append(openers[name](folder, settings, first_step))
    return trackers


class _TensorBoard:
    def __init__(self, folder: Path, settings: Mapping[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter as Board

        # An interrupted run has written later steps, which this one takes again.
        self._board = Board(str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class _WeightsAndBiases:
    def __init__(self, folder: Path, settings: Mapping[str, Any], first_step: int) -> None:
        import wandb

        self._run = wandb.init(
            project="vimamba",
            name=folder.name,
            dir=str(folder),
            config=dict(settings),
            id=_known_record(folder, "wandb"),
            resume="allow",
        )
        _keep_record(folder, "wandb", self._run.id)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, folder: Path, settings: Mapping[str, Any], first_step: int) -> None:
        import mlflow

        self._mlflow = mlflow
        known = _known_record(folder, "mlflow")
        run = mlflow.start_run(run_id=known, run_name=None if known else folder.name)
        _keep_record(folder, "mlflow", run.info.run_id)
        if known is None:
            mlflow.log_params({name: str(value) for name, value in settings.items()})

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(figures), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def _known_record(folder: Path, tracker: str) -> str | None:
    path = folder / "trackers.json"
    return json.loads(path.read_text(encoding="utf-8")).get(tracker) if path.exists() else None


def _keep_record(folder: Path, tracker: str, record: str) -> None:
    path = folder / "trackers.json"
    records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_text(path, json.dumps(records | {tracker: record}, indent=2) + "\n")
