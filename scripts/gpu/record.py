"""The record of a run: one file of lines of JSON, to which every process appends, so that a run cut off keeps it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
NO_GPU, NO_TIME = "no GPU", "the time was over"


class Unavailable(Exception):
    """Error of a step for a tool or package that is not installed; nothing is wrong."""


def append(path: Path, **line: Any) -> None:
    """Append a line; whole lines, also from several processes."""
    data = (json.dumps(line) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def lines(path: Path) -> list[Row]:
    """Return all lines; the last one may have been cut off."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return found


class Section:
    """One section of a run: a sequence of steps, recorded as they go.

    A step that was begun before, by a process that ended in it, is not tried again.

    Args:
        name: Name of the section.
        path: File of the record.
        deadline: When the section must have ended, as `time.time()`.
        gpu: Whether there is a GPU; without one, steps are rehearsed or listed.
        speed: 0, or how many times faster than on a GPU steps go by that only sleep.
    """

    def __init__(self, name: str, path: Path, deadline: float, gpu: bool, speed: float = 0.0) -> None:
        self.name, self.path, self.deadline, self.gpu, self.speed = name, path, deadline, gpu, speed
        mine = [line for line in lines(path) if line.get("section") == name]
        self._begun = {line["begun"] for line in mine if "begun" in line}

    def row(self, **row: Any) -> None:
        """Record and print a result."""
        append(self.path, section=self.name, row=row)
        _say(f"{self.name}: {' '.join(f'{key}={_short(value)}' for key, value in row.items())}")

    def fact(self, **facts: Any) -> None:
        """Record what holds for all results of the section."""
        append(self.path, section=self.name, facts=facts)

    def not_run(self, what: str, why: str) -> None:
        """Record a step without a result, and the reason."""
        append(self.path, section=self.name, not_run=f"{what}: {why}")
        _say(f"{self.name}: not run: {what}: {why}")

    def seconds_left(self) -> float:
        """Return the seconds until the section's deadline; of a GPU, where steps only sleep."""
        return (self.deadline - time.time()) * (self.speed or 1.0)

    def run(
        self,
        what: str,
        seconds: float,
        action: Callable[[], Iterable[Row]],
        rehearsal: Callable[[], Iterable[Row]] | None = None,
    ) -> None:
        """Run a step and record its rows, or why there are none.

        Args:
            what: Name of the step, of its own.
            seconds: How long it takes on a GPU, about. A step that does not fit into the time left is not begun.
            action: Yields the rows.
            rehearsal: Takes its place where there is no GPU.
        """
        if what in self._begun:
            return
        chosen = action if self.gpu else rehearsal
        if self.seconds_left() < seconds and (self.gpu or self.speed):
            self.not_run(what, NO_TIME)
            return
        append(self.path, section=self.name, begun=what)
        if self.speed:
            time.sleep(seconds / self.speed)
            self.row(step=what, pretended_seconds=seconds)
        elif chosen is None:
            self.not_run(what, NO_GPU)
        else:
            try:
                for row in chosen():
                    self.row(**row)
            except Unavailable as error:
                self.not_run(what, str(error))
            except Exception as error:  # whatever a compiler, a driver or a library raises: the next step still runs
                append(self.path, section=self.name, failed=f"{what}: {reason(error)}")
                _say(f"{self.name}: failed: {what}: {reason(error)}")
                self._stop_if_broken()
        append(self.path, section=self.name, ended=what)

    def _stop_if_broken(self) -> None:
        """Raise if the GPU takes no more work from this process, as after an access to memory that is not its own.

        The suite then starts the section again, which goes on with the next step.
        """
        if self.gpu:
            import torch

            torch.cuda.empty_cache()
            torch.cuda.synchronize()


def reason(error: BaseException) -> str:
    """Return an error in one line."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text[:300]}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 160 else text[:157] + "..."


def _say(text: str) -> None:
    print(text, flush=True)
