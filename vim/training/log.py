"""What a run shows and records: a progress bar or plain lines, `summary.csv`, and figures for trackers."""

import csv
import datetime
import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from vim.checkpoints.io import write_text
from vim.training.trackers import Tracker

_LOADING_BOUND = 20.0  # percent of the training time that may go into waiting for images, before it is said
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
        self._console.print(text, markup=False, highlight=False, emoji=False)

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
    """Records the figures of every epoch in `summary.csv`, and those of steps and epochs in trackers.

    Args:
        summary: The CSV file; it is written anew, whole, after every epoch. `None` records nothing.
        trackers: Where figures go besides.
    """

    def __init__(self, summary: Path | None, trackers: Sequence[Tracker] = ()) -> None:
        self._summary, self._trackers = summary, trackers

    def write_step(self, figures: Mapping[str, float], step: int) -> None:
        """Record the figures of an optimizer step."""
        for tracker in self._trackers:
            tracker.log({f"step/{name}": value for name, value in figures.items()}, step)

    def write_epoch(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Record the last of these rows, and all of them in the CSV file."""
        if self._summary is None:
            return
        row = history[-1]
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        write_text(self._summary, text.getvalue())
        figures = {
            name.replace("_", "/", 1): value
            for name, value in row.items()
            if name not in ("epoch", "step") and value is not None
        }
        for tracker in self._trackers:
            tracker.log(figures, row["step"])

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self._trackers:
            tracker.close()


def describe_epoch(row: Mapping[str, Any], epochs: int) -> str:
    """Return the figures of an epoch as one line."""
    ema = "" if row["ema_top1"] is None else f"  EMA {row['ema_top1']:5.1f} %"
    norm = "" if row["grad_norm"] is None else f"  gradient {row['grad_norm']:.2g}"
    memory = "" if row["memory_gib"] is None else f"  {row['memory_gib']:.1f} GiB"
    skipped = f"  {row['skipped_steps']} steps skipped" if row["skipped_steps"] else ""
    return (
        f"epoch {row['epoch']:{len(str(epochs))}d}/{epochs}  "
        f"training: loss {row['train_loss']:.3f}, {row['train_top1']:5.1f} %  "
        f"held out: loss {row['val_loss']:.3f}, {row['val_top1']:5.1f} %{ema}{norm}{skipped}  "
        f"{row['images_per_second']:,.0f} images/s, {row['data_wait_percent']:.0f} % waiting{memory}  "
        f"{_duration(row['seconds'])}"
    )


def loading_advice(row: Mapping[str, Any], workers: int) -> list[str]:
    """Return a line of advice if training waited for images for too much of its time."""
    share = row["data_wait_percent"]
    if share <= _LOADING_BOUND:
        return []
    return [
        f"advice: {share:.0f} % of the training time went into waiting for images; raise data.workers, now {workers}, "
        "or put smaller images on a faster disk"
    ]


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(datetime.timedelta(seconds=round(seconds)))
