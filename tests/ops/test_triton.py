"""The Triton backend: its kernels in Triton's interpreter, its reasons, what it compiles to."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.backends import chosen_op
from tests.helpers import make_bidirectional_inputs
from tests.processes import run_command, run_python
from vim.ops import available_backends, unavailable_backends
from vim.ops.backends.registry import isolated_registry

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed; PyTorch for Linux comes with it"
)


def _run_interpreted(file: str, keyword: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "", "-k", keyword, file]
    assert " passed" in run_command(*command, TRITON_INTERPRET="1")  # not a fork: Triton reads this when it is imported


def _interpreter_misses_numpy() -> bool:
    """The interpreter of Triton 3.6 makes numbers of arrays, as NumPy did before 2.4."""
    if importlib.util.find_spec("triton") is None:
        return False
    found = [re.findall(r"\d+", importlib.metadata.version(name)) for name in ("triton", "numpy")]
    triton, numpy = (tuple(map(int, numbers[:2])) for numbers in found)
    return triton <= (3, 6) and numpy >= (2, 4)


interpreter_works = pytest.mark.skipif(
    _interpreter_misses_numpy(), reason="this Triton's interpreter needs an older NumPy: pip install 'numpy<2.4'"
)


@interpreter_works
def test_some_kernels_in_the_interpreter():
    _run_interpreted(
        "tests/ops/test_conformance.py", "(add_rms_norm or causal_conv1d) and bfloat16 and test_case or every_output"
    )


# Shares of about the same length, so that workers can take one each.
@pytest.mark.slow
@interpreter_works
@pytest.mark.parametrize(
    ("file", "keyword"),
    [
        ("triton_kernels", ""),
        ("test_conformance", "golden"),
        ("test_conformance", "test_case and bidirectional_scan"),
        ("test_conformance", "test_case and selective_scan"),
        ("test_conformance", "test_case and not _scan"),
        ("test_conformance", "empty or written or registration or float64"),
    ],
)
def test_kernels_in_the_interpreter(file, keyword):
    _run_interpreted(f"tests/ops/{file}.py", keyword)


def _compile(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Return what Triton makes of its kernels."""
    words = ("-m", "scripts.check_triton_compiles", *arguments, "--json", folder / "rows")
    run_python(*words, TRITON_CACHE_DIR=str(folder), TRITON_INTERPRET="0")
    return json.loads((folder / "rows").read_text())


# The bidirectional scan's backward pass is the selective scan's, twice, and takes as long again to compile; the script
# compiles everything.
@pytest.mark.parametrize("ops", [pytest.param(["selective_scan"], marks=pytest.mark.slow), ["add_rms_norm"]], ids=str)
def test_kernels_compile_for_a_gpu(ops, tmp_path):
    rows = {row["kernel"]: row for row in _compile(tmp_path, "sm_90", "--ops", *ops)}
    assert {f"{op}_{side}_kernel" for op in ops for side in ("fwd", "bwd")} <= set(rows)
    for kernel, row in rows.items():
        assert row["spilled"] == 0 or kernel == "selective_scan_bwd_kernel"
        assert row["spilled"] <= 128, "bytes a thread"
    if "selective_scan" in ops:
        assert rows["selective_scan_fwd_kernel"]["shuffles"] == 0, "a channel's states are in one thread"


def test_no_launch_passes_a_tuple_within_a_tuple(monkeypatch):
    """Triton 3.6, PyTorch 2.11's, loses strides of 1 in them; scripts/check_triton_versions.sh compiles with it."""
    module = importlib.import_module("vim.ops.bidirectional_scan.triton")
    passed: list[Any] = []

    class Kernel:
        def __getitem__(self, grid: object) -> Any:
            return lambda *arguments, **settings: passed.extend(arguments)

    for name in (
        "bidirectional_scan_fwd_kernel",
        "bidirectional_scan_bwd_kernel",
        "merge_fwd_kernel",
        "merge_bwd_kernel",
    ):
        monkeypatch.setattr(module, name, Kernel())
    *operands, z = (t.detach() for t in make_bidirectional_inputs(1, 5, 6, 4, 2))
    _, entry = module.bidirectional_scan(*operands, z, 0.5, 64)
    module.bidirectional_scan_backward(z, *operands, z, entry, 0.5, 64)
    tuples = [argument for argument in passed if isinstance(argument, tuple)]
    assert tuples
    assert not any(isinstance(part, tuple) for argument in tuples for part in argument)


@pytest.mark.slow
def test_each_target_is_compiled_for(tmp_path):
    """Triton keeps kernels by device: without a device of its own, a target would be given another one's."""
    rows = _compile(tmp_path, "sm_90", "gfx942", "--ops", "add_rms_norm")
    # Shuffles are counted in the code of NVIDIA's GPUs alone.
    assert {(row["target"], "shuffles" in row) for row in rows} == {("sm_90", True), ("gfx942", False)}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET is set")
def test_reasons():
    assert "its kernels are for GPUs" in unavailable_backends("selective_scan", "cpu")["triton"]
    assert "float64" in unavailable_backends("selective_scan", "cuda", torch.float64)["triton"]
    assert "does not compile for mps" in unavailable_backends("selective_scan", "mps")["triton"]


def test_a_gpu_runs_on_triton_and_a_machine_without_it_is_told_so(monkeypatch):
    with isolated_registry({"triton", "reference"}):  # a machine with a GPU and nvcc has native kernels, too
        assert available_backends("selective_scan", "cuda") == ("triton", "reference")
        assert chosen_op("selective_scan", None, "cuda") is torch.ops.vim.selective_scan_triton.default
        assert chosen_op("selective_scan", None, "cuda", torch.float64) is torch.ops.vim.selective_scan.default
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert unavailable_backends("selective_scan", "cuda")["triton"] == "triton is not installed"
