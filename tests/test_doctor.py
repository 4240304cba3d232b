"""`python -m vim.doctor` says what there is."""

from __future__ import annotations

import subprocess
import sys

import torch

from vim import doctor
from vim.ops.backends import native, registry
from vim.runtime import machine


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


def test_the_report_has_the_facts_that_run_folders_and_benchmarks_record(capsys, monkeypatch):
    monkeypatch.setattr(
        machine.Path, "read_text", lambda *_: "model name : Abacus\nflags : fma avx2\n\nmodel name : B\n"
    )
    monkeypatch.setattr(machine, "_version", {"timm": "1.2.3"}.get)
    lines = [*doctor._processor(), *doctor._versions()]
    assert machine.describe_machine()["cpu"] == machine.describe_environment(torch.device("cpu"))["cpu"] == "Abacus"
    assert lines[0].startswith("Abacus, ")
    assert lines[0].endswith(": avx2 fma")
    assert "timm 1.2.3" in lines
    assert "triton: not installed" in lines


def test_a_machine_without_cpuinfo_has_a_processor_too(monkeypatch):
    def missing(*_):
        raise FileNotFoundError

    monkeypatch.setattr(machine.Path, "read_text", missing)
    assert machine.processor_name()
    assert machine.processor_features(["avx2"]) == []


def test_as_a_command():
    done = subprocess.run([sys.executable, "-m", "vim.doctor"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "backends" in done.stdout
