"""A few calls of scripts/fuzz_ops.py, which needs thousands and sanitizers to find anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz_ops.py"


@pytest.mark.slow
def test_every_call_returns_or_raises():
    command = [sys.executable, str(SCRIPT), "--calls", "150", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "seed 3, calls 0 to 149\n" in done.stdout
    for op in ("selective_scan", "bidirectional_scan_backward", "causal_conv1d", "add_rms_norm_backward"):
        assert f"{op}: " in done.stdout
