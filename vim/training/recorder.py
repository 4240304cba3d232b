"""Figures of a run in files: `summary.csv`, and whatever the trackers write."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vim.checkpoints.io import write_text
from vim.training.trackers import Tracker


class Recorder:
    """A recorder of figures: epochs go to `summary.csv`, steps and epochs to the trackers.

    Args:
        summary: The CSV file, rewritten as a whole after every epoch. `None` records no epochs.
        trackers: The trackers.
    """

    def __init__(self, summary: Path | None, trackers: Sequence[Tracker] = ()) -> None:
        self._summary, self._trackers = summary, trackers

    def write_step(self, figures: Mapping[str, float], step: int) -> None:
        """Record the figures of an optimizer step."""
        for tracker in self._trackers:
            tracker.log({f"step/{name}": value for name, value in figures.items()}, step)

    def write_epoch(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Send the last row to the trackers, and write all rows into the CSV file."""
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
