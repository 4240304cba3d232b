"""A few calls of scripts/fuzz_ops.py, which needs thousands and sanitizers to find anything."""

from __future__ import annotations

import sys

import pytest

from tests.processes import run_command


@pytest.mark.slow
def test_every_call_returns_or_raises():
    printed = run_command(sys.executable, "scripts/fuzz_ops.py", "--calls", "150", "--seed", "3", timeout=300)
    assert "seed 3, calls 0 to 149\n" in printed
    for op in (
        "selective_scan",
        "bidirectional_scan_backward",
        "causal_conv1d",
        "segmented_scan",
        "add_rms_norm_backward",
    ):
        assert f"{op}: " in printed
    assert "no call to start from" not in printed
