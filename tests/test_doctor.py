"""`python -m vim.doctor` says what there is."""

from __future__ import annotations

import subprocess
import sys

from vim import doctor
from vim.ops.backends import native, registry


def test_report(capsys):
    assert doctor.main() == 0
    report = capsys.readouterr().out
    for word in ("versions", "torch", "timm", "processor", "compiler", "cache", "native kernels", "sources"):
        assert word in report
    assert set(doctor.OPS) == set(registry._references)
    for op in doctor.OPS:
        assert f"cpu {op} (" in report
    assert "float64: not native: float64 runs on the reference" in report


def test_a_missing_library_is_reported_with_its_reason(capsys, monkeypatch):
    monkeypatch.setattr(native.cpu, "path", None)
    monkeypatch.setattr(native.cpu, "reason", "no compiler was found")
    assert doctor.main() == 0
    report = capsys.readouterr().out
    assert "not in use: no compiler was found" in report
    assert "cpu float32: not native: no compiler was found" in report


def test_as_a_command():
    done = subprocess.run([sys.executable, "-m", "vim.doctor"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "backends" in done.stdout
