"""The Triton backend: its kernels in Triton's interpreter (or on a GPU), its reasons, what it compiles to."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vim.ops import available_backends, unavailable_backends
from vim.ops.backends import registry

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed; PyTorch for Linux comes with it"
)


def _run_kernel_tests(keyword: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", keyword]
    done = subprocess.run(
        [*command, "tests/ops/triton_kernels.py"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def _interpreter_misses_numpy() -> bool:
    """The interpreter of Triton 3.6 makes numbers of arrays, as NumPy did before 2.4."""
    if importlib.util.find_spec("triton") is None:
        return False
    found = [re.findall(r"\d+", importlib.metadata.version(name)) for name in ("triton", "numpy")]
    triton, numpy = (tuple(map(int, numbers[:2])) for numbers in found)
    return triton <= (3, 6) and numpy >= (2, 4)


# Shares of about the same length, so that workers can take one each.
@pytest.mark.skipif(
    _interpreter_misses_numpy(), reason="this Triton's interpreter needs an older NumPy: pip install 'numpy<2.4'"
)
@pytest.mark.parametrize(
    "keyword", ["golden_scan", "golden_mixer", "bidirectional", "not golden and not bidirectional"]
)
def test_kernels_in_the_interpreter(keyword):
    _run_kernel_tests(keyword, TRITON_INTERPRET="1")


# The bidirectional scan's backward pass is the selective scan's, twice, and takes as long again to compile; the script
# compiles everything.
@pytest.mark.parametrize("ops", [["selective_scan"], ["add_rms_norm"]])
def test_kernels_compile_for_a_gpu(ops, tmp_path):
    command = [sys.executable, "scripts/check_triton_compiles.py", "sm_90", "--json", tmp_path / "rows", "--ops", *ops]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = {row["kernel"]: row for row in json.loads((tmp_path / "rows").read_text())}
    assert {f"{op}_{side}_kernel" for op in ops for side in ("fwd", "bwd")} <= set(rows)
    for kernel, row in rows.items():
        assert row["spilled"] == 0 or kernel == "selective_scan_bwd_kernel"
        assert row["spilled"] <= 128, "bytes a thread"
    if "selective_scan" in ops:
        assert rows["selective_scan_fwd_kernel"]["shuffles"] == 0, "a channel's states are in one thread"


def test_each_target_is_compiled_for(tmp_path):
    """Triton keeps kernels by device: without a device of its own, a target would be given another one's."""
    command = [sys.executable, "scripts/check_triton_compiles.py", "sm_90", "gfx942", "--json", tmp_path / "rows"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    subprocess.run([*command, "--ops", "add_rms_norm"], cwd=ROOT, env=environment, capture_output=True, check=True)
    rows = json.loads((tmp_path / "rows").read_text())
    # Shuffles are counted in the code of NVIDIA's GPUs alone.
    assert {(row["target"], "shuffles" in row) for row in rows} == {("sm_90", True), ("gfx942", False)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_on_the_gpu():
    _run_kernel_tests("test")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET is set")
def test_reasons():
    assert "its kernels are for GPUs" in unavailable_backends("selective_scan", "cpu")["triton"]
    assert "float64" in unavailable_backends("selective_scan", "cuda", torch.float64)["triton"]
    assert "does not compile for mps" in unavailable_backends("selective_scan", "mps")["triton"]
    assert available_backends("selective_scan", "cuda") == ("triton", "reference")


def test_a_gpu_runs_on_triton_and_a_machine_without_it_is_told_so(monkeypatch):
    registry._choose.cache_clear()
    assert registry._suffix("selective_scan", None, "cuda", torch.float32) == "_triton"
    assert registry._suffix("selective_scan", None, "cuda", torch.float64) == ""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert unavailable_backends("selective_scan", "cuda")["triton"] == "triton is not installed"
    registry._choose.cache_clear()
