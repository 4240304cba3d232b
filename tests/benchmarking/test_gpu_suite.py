"""The GPU suite as far as it goes without a GPU: what it counts, measures and writes down."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from scripts.gpu_kernels import Shape, kernels_of
from tests.processes import run_command
from vim.benchmarking.models import measure_case

ROOT = Path(__file__).parents[2]


def test_bytes_of_the_kernels_are_those_of_their_tensors():
    shape = Shape(name="", batch=2, len=65, d_model=32)
    assert (shape.dim, shape.dt_rank, shape.tokens) == (64, 2, 130)
    found = {kernel.op: kernel for kernel in kernels_of(shape, torch.bfloat16, "cpu")}
    inner = 2 * 65 * 64
    assert found["add_rms_norm"].bytes == 2 * 65 * 32 * (2 + 4 + 2 + 4)
    assert found["bidirectional_conv1d"].bytes == 3 * inner * 2
    assert found["bidirectional_scan"].bytes == 4 * inner * 2 + 2 * (2 * 65 * (2 + 32) * 2)
    assert found["bidirectional_scan"].special == 2 * inner * 18
    assert found["bidirectional_scan backward"].special == 2 * found["bidirectional_scan"].special


def test_a_model_that_does_not_run_is_named_and_the_others_are_measured():
    rows, failed = measure_case(
        ["vim_tiny_patch16_224", "vim_tiny_patch16_224:triton"],
        32,
        1,
        "float32",
        "inference",
        torch.device("cpu"),
        1,
        1,
    )
    assert [row.model for row in rows] == ["vim_tiny_patch16_224"]
    (reason,) = failed.values()
    assert "triton" in reason


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: this is about its absence")
def test_rehearsal(tmp_path):
    command = ("bash", "scripts/gpu_suite.sh", "--output", tmp_path / "gpu", "--sections", "kernels", "latency")
    run_command(*command, PYTHON=sys.executable)
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["gpu"] is False
    assert [row["op"] for row in record["sections"]["kernels"]["rows"]][::3] == [
        "add_rms_norm",
        "add_rms_norm backward",
    ]
    assert "latency of Vim-Ti at 224px: no GPU" in record["sections"]["latency"]["not_run"]
    assert not any(section["died"] for section in record["sections"].values())
    report = (tmp_path / "gpu.md").read_text()
    assert "there was no GPU" in report
    assert "kernels of Ti 224 b64: no GPU" in report
    assert [p.name for p in tmp_path.iterdir() if "part" in p.name] == []
