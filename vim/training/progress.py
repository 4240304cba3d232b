"""Progress of a run on the console: a bar or plain lines, and a line for each epoch."""

import datetime
import os
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_LOADING_BOUND = 20.0  # percent of the training time spent waiting for images, above which advice is given
_SHORT_EPOCH = 10.0  # seconds of training, below which starting to load counts for much, and no advice is given
_PLAIN_INTERVAL = 30.0  # seconds between two lines inside an epoch, without a terminal


class Reporter:
    """Progress of a run on the console: a live bar on a terminal, plain lines elsewhere.

    Args:
        total_steps: Optimizer steps in the whole run.
        first_step: Steps done before the run was resumed.
        console: The console to write to; `None` is the standard output.
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
        """Write a line above the bar."""
        self._console.print(text, markup=False, highlight=False, emoji=False)

    def step(self, epoch: str, done: int, figures: str) -> None:
        """Show an optimizer step.

        Args:
            epoch: The number of the epoch, in words.
            done: Optimizer steps done in the whole run.
            figures: Figures of the epoch so far, in words.
        """
        if self._progress is not None:
            self._progress.update(self._task, completed=done, epoch=epoch, figures=figures)
            return
        now = time.monotonic()
        if now - self._last_line >= _PLAIN_INTERVAL:
            self._last_line = now
            left = (now - self._began) / max(1, done - self._first) * (self._total - done)
            self.line(f"{epoch}  {100 * done / self._total:.0f} %  {figures}  {_duration(left)} left")


def describe_epoch(row: Mapping[str, Any], epochs: int, figures: str) -> str:
    """Return the figures of an epoch as one line.

    Args:
        row: The row of `summary.csv`.
        epochs: Epochs of the run.
        figures: The figures of the task, in words.
    """
    norm = "" if row["grad_norm"] is None else f"  gradient {row['grad_norm']:.2g}"
    memory = "" if row["memory_gib"] is None else f"  {row['memory_gib']:.1f} GiB"
    skipped = f"  {row['skipped_steps']} steps skipped" if row["skipped_steps"] else ""
    return (
        f"epoch {row['epoch']:{len(str(epochs))}d}/{epochs}  "
        f"{figures}{norm}{skipped}  "
        f"{row['images_per_second']:,.0f} images/s, {row['data_wait_percent']:.0f} % waiting{memory}  "
        f"{_duration(row['seconds'])}"
    )


def loading_advice(row: Mapping[str, Any], workers: int) -> list[str]:
    """Return a line of advice if training spent much of its time waiting for images, else an empty list."""
    share = row["data_wait_percent"]
    if share <= _LOADING_BOUND or row["seconds"] < _SHORT_EPOCH:
        return []
    more = f"raise data.workers, now {workers}, or " if workers < (os.cpu_count() or 1) else ""
    return [
        f"advice: {share:.0f} % of the training time went into waiting for images; {more}put smaller images on a "
        "faster disk"
    ]


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(datetime.timedelta(seconds=round(seconds)))
