"""`python -m vim.doctor` says what there is."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest
import torch

from tests.processes import run_python
from vim import compat, doctor
from vim.inference.installation import OPS
from vim.ops import available_backends
from vim.ops.backends import native
from vim.runtime import machine


def test_report(capsys):
    assert doctor.main([]) == 0
    report = capsys.readouterr().out
    for word in ("versions", "torch", "timm", "processor", "compiler", "cache", "native kernels", "sources"):
        assert word in report
    for op in OPS:
        assert f"cpu {op} (" in report
    assert "float64: not native: float64 runs on the reference" in report
    reasons = [line for line in report.splitlines() if re.match("  cpu .*: not ", line)]
    assert len({line.split(": not ")[1] for line in reasons}) == len(reasons), "a reason is printed once"


def test_stand_ins_are_reported(capsys):
    assert doctor.main([]) == 0
    assert "mamba_ssm: nothing; vim.compat.install() puts a stand-in in place" in capsys.readouterr().out
    with compat.as_mamba_ssm():
        assert doctor.main([]) == 0
    assert "causal_conv1d: vim.compat stands in for it" in capsys.readouterr().out


def test_every_op_is_reported():
    with pytest.raises(ValueError, match=re.escape(f"op must be one of {sorted(OPS)}, got")):
        available_backends("no op")


def test_a_missing_library_is_reported_with_its_reason(capsys, monkeypatch):
    monkeypatch.setattr(native.cpu, "path", None)
    monkeypatch.setattr(native.cpu, "reason", "no compiler was found")
    assert doctor.main([]) == 0
    report = capsys.readouterr().out
    assert "not in use: no compiler was found" in report
    assert "cpu float32, bfloat16, float16: not native: no compiler was found" in report


def test_the_report_has_the_facts_that_run_folders_and_benchmarks_record(capsys, monkeypatch):
    read_text, version = Path.read_text, importlib.metadata.version
    facts = "model name : Abacus\nflags : fma avx2\n\nmodel name : B\n"

    def read_facts(path, *args, **kwargs):
        return facts if path.name == "cpuinfo" else read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read_facts)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.3" if name == "timm" else version(name))
    assert machine.describe_machine()["cpu"] == machine.describe_environment(torch.device("cpu"))["cpu"] == "Abacus"
    assert doctor.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    (processor,) = [line for line in lines if line.startswith("  Abacus, ")]
    assert processor.endswith(": avx2 fma")
    assert "  timm 1.2.3" in lines


def test_a_package_that_is_missing_is_reported(capsys, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert doctor.main([]) == 0
    assert "  triton: not installed\n" in capsys.readouterr().out


def test_a_machine_without_cpuinfo_has_a_processor_too(monkeypatch):
    def missing(*_):
        raise FileNotFoundError

    monkeypatch.setattr(machine.Path, "read_text", missing)
    assert machine.processor_name()
    assert machine.processor_features(["avx2"]) == []


def test_as_a_command():
    assert "backends" in run_python("-m", "vim.doctor")
