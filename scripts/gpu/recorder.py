"""A plugin of pytest that appends failures to the suite's record as they come, and counts now and then."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from scripts.gpu.record import append

# Seconds between two counts.
_EVERY = 5.0


class _Recorder:
    """Counts of outcomes so far."""

    def __init__(self, section: str, path: Path) -> None:
        self.section, self.path = section, path
        self.counts: Counter[str] = Counter()
        self.said = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test, and record why it failed."""
        if report.failed:
            why = str(getattr(report.longrepr, "reprcrash", None) or report.longrepr).strip()
            row = {"test": report.nodeid, "ok": False, "why": why.splitlines()[-1][-400:]}
            append(self.path, section=self.section, row=row)
        if report.when == "call" or not report.passed:
            self.counts[report.outcome] += 1
        if time.monotonic() - self.said > _EVERY:
            self._count()

    def pytest_sessionfinish(self) -> None:
        """Record the last counts."""
        self._count()

    def _count(self) -> None:
        self.said = time.monotonic()
        append(self.path, section=self.section, facts=dict(self.counts))
        print(f"\n{self.section}: {dict(self.counts)}", flush=True)


def pytest_configure(config: pytest.Config) -> None:
    """Record in the process that distributes the tests, not in its workers."""
    target: Any = os.environ.get("VIM_GPU_RECORD")
    if target and not hasattr(config, "workerinput"):
        section, path = target.split(":", 1)
        config.pluginmanager.register(_Recorder(section, Path(path)))
