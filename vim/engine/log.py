"""What a run shows and records: a progress bar or plain lines, `summary.csv`, TensorBoard."""

import csv
import datetime
import importlib.util
import io
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from vim.checkpoints.io import write_text

_logger = logging.getLogger(__name__)

_PLAIN_INTERVAL = 30.0  # seconds between two lines inside an epoch, where there is no terminal


class Reporter:
    """Shows how far a run is: a live bar on a terminal, plain lines elsewhere.

    Args:
        total_steps: Optimizer steps in the whole run.
        first_step: Steps that were done before, by the run that this one carries on.
        console: Where to write; `None` is the standard output.
    """

    def __init__(self, total_steps: int, first_step: int = 0, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._total, self._first = total_steps, first_step
        self._began = self._last_line = time.monotonic()
        self._progress: Progress | None = None
        self._task = TaskID(0)
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.fields[epoch]}"),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:>3.0f} %"),
                TextColumn("{task.fields[figures]}"),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
                speed_estimate_period=60,
            )
            self._task = self._progress.add_task("", total=total_steps, completed=first_step, epoch="", figures="")

    def __enter__(self) -> "Reporter":
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def line(self, text: str) -> None:
        """Write a line; a live bar stays below it."""
        self._console.print(text, markup=False, highlight=False)

    def step(self, epoch: str, done: int, loss: float, accuracy: float, images_per_second: float) -> None:
        """Show an optimizer step.

        Args:
            epoch: Which epoch it is, in words.
            done: Optimizer steps done in the whole run.
            loss: Mean training loss of the epoch so far.
            accuracy: Training accuracy of the epoch so far, in percent.
            images_per_second: Training speed of the epoch so far.
        """
        figures = f"loss {loss:.3f}  accuracy {accuracy:.1f} %  {images_per_second:,.0f} images/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=done, epoch=epoch, figures=figures)
            return
        now = time.monotonic()
        if now - self._last_line >= _PLAIN_INTERVAL:
            self._last_line = now
            left = (now - self._began) / max(1, done - self._first) * (self._total - done)
            self.line(f"{epoch}  {100 * done / self._total:.0f} %  {figures}  {_duration(left)} left")


class Recorder:
    """Records the figures of every epoch in `summary.csv`, and in TensorBoard's format if that is installed.

    Args:
        summary: The CSV file; it is written anew, whole, after every epoch.
        tensorboard: Folder for TensorBoard.
        first_step: Steps done before; what TensorBoard holds beyond them, from a run cut short, is dropped.
    """

    def __init__(self, summary: Path, tensorboard: Path, first_step: int = 0) -> None:
        self._summary = summary
        self._board: Any = None
        if importlib.util.find_spec("tensorboard") is None:
            _logger.info("tensorboard is not installed: no event files are written")
            return
        from torch.utils.tensorboard import SummaryWriter as Board

        self._board = Board(str(tensorboard), purge_step=first_step or None)

    def write_epoch(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Record the last of these rows, and all of them in the CSV file."""
        row = history[-1]
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        write_text(self._summary, text.getvalue())
        if self._board is not None:
            for name, value in row.items():
                if name not in ("epoch", "step") and value is not None:
                    self._board.add_scalar(name.replace("_", "/", 1), value, row["step"])
            self._board.flush()

    def close(self) -> None:
        """Close the files."""
        if self._board is not None:
            self._board.close()


def describe_epoch(row: Mapping[str, Any], epochs: int) -> str:
    """Return the figures of an epoch as one line."""
    ema = "" if row["ema_top1"] is None else f"  EMA {row['ema_top1']:5.1f} %"
    return (
        f"epoch {row['epoch']:{len(str(epochs))}d}/{epochs}  "
        f"training: loss {row['train_loss']:.3f}, {row['train_top1']:5.1f} %  "
        f"held out: loss {row['val_loss']:.3f}, {row['val_top1']:5.1f} %{ema}  "
        f"{row['images_per_second']:,.0f} images/s  {_duration(row['seconds'])}"
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(datetime.timedelta(seconds=round(seconds)))
