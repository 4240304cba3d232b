"""Settings of the test run."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

from tests import emulated

# Two workers on two cores: a thread each. Spinning OpenMP threads on shared cores cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The CUDA kernels without a GPU: one more backend for whatever runs over all backends.
emulated.register()

# CI installs everything that tests need, so there a test may be skipped only for what a CI machine may lack.
# ExecuTorch is made for one version of torch, not for the newest.
_MAY_BE_SKIPPED = (
    "no GPU",
    "no browser",
    "not on this processor",
    "pip install --no-deps mambavision",
    "no executorch",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of single tests."""
    parser.addoption("--kills", type=int, default=2, help="how often to kill a run in tests/training/test_kill.py")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail what is skipped in CI although it could run there."""
    report = yield
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr)
        if not any(word in reason for word in _MAY_BE_SKIPPED):
            report.outcome, report.longrepr = "failed", f"skipped in CI, where it could run: {reason}"
    return report
