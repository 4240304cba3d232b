"""What only the Triton kernels have, beside the cases of `test_conformance.py`.

Not collected by itself, because Triton reads TRITON_INTERPRET when it is imported: `test_triton.py` runs this file and
the conformance tests in a process of their own, in Triton's interpreter on the CPU.
"""

from __future__ import annotations

import logging

import pytest
import torch

from tests.helpers import (
    TOLERANCES,
    assert_close,
    assert_same_gradients,
    golden_names,
    make_bidirectional_inputs,
    make_scan_inputs,
)
from tests.ops.conformance import FLOATS, check_golden_scan, run_op
from tests.ops.interpreted import set_lanes
from vim.ops import ScanOperands, available_backends, bidirectional_scan, selective_scan

SCANS = [name for name in golden_names("scan") if not name.endswith(("L64", "L197", "L1000"))]


@pytest.fixture(autouse=True)
def _wide_blocks(monkeypatch):
    """Blocks of 64 channels, which are fewer programs."""
    set_lanes(monkeypatch, 64)


def test_the_backend_is_there():
    for op in (
        *("selective_scan", "segmented_scan", "bidirectional_scan", "add_rms_norm"),
        *("causal_conv1d", "segmented_conv1d", "bidirectional_conv1d"),
    ):
        for dtype in FLOATS:
            assert "triton" in available_backends(op, "cpu", dtype)


@pytest.mark.parametrize("case", SCANS)
def test_golden_scan(case):
    check_golden_scan(case, "triton")


def test_what_the_reference_computes_in_its_place_is_said_once(caplog):
    with caplog.at_level(logging.WARNING, "vim"):
        for dtype in (torch.float32, torch.float64, torch.float64):
            x = torch.ones(2, 3, dtype=dtype)
            run_op("add_rms_norm_triton", x, None, torch.ones(3, dtype=dtype), 1e-5)
    (record,) = caplog.records
    assert "does not compute add_rms_norm in float64: the reference runs" in record.getMessage()


def test_small_steps_keep_their_relative_accuracy():
    """softplus(x) for very negative x is exp(x), to the last digits."""
    x = torch.linspace(-16, 20, 64).view(1, -1, 1)  # scans of one token: y = softplus(x)
    ones, A, B = torch.ones_like(x), torch.full((64, 1), -1.0), torch.ones(1, 1, 1)
    y = torch.ops.vim.selective_scan_triton(ones, x, A, B, B, None, None, None, True, False, 0)[0]
    expected = torch.nn.functional.softplus(x.double(), threshold=100)
    assert ((y.double() - expected).abs() / expected).max() < 3e-6


def test_extreme_steps_stay_finite():
    inputs = {name: t.detach() for name, t in make_scan_inputs(1, 4, 3, 3).items()}
    for delta in (1e4, -1e4, 0.0):
        inputs["delta"] = torch.full_like(inputs["delta"], delta)
        assert torch.isfinite(run_op("selective_scan_triton", *inputs.values(), True, False, 0)[0]).all()


@pytest.mark.parametrize("merge", ["mean", "sum"])
def test_gradients_through_autograd(merge):
    """v1 mixers: the directions share all operands but the decay."""
    leaves = make_bidirectional_inputs(1, 5, 6, 4, 2)

    def scan(backend: str) -> torch.Tensor:
        shared = ScanOperands(*leaves[:4], leaves[10], leaves[5])
        return bidirectional_scan(ScanOperands(*leaves[:6]), shared, leaves[12], merge, backend=backend)

    used = [*leaves[:6], leaves[10], leaves[12]]
    actual, expected = scan("triton"), scan("reference")
    assert_close(actual, expected, TOLERANCES[torch.float32].value)
    assert_same_gradients(actual, expected, used, TOLERANCES[torch.float32].gradient)


def test_the_op_stands_in_compiled_graphs():
    inputs = make_scan_inputs(1, 3, 2, 2)
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    actual, expected = (f(**inputs, delta_softplus=True, backend="triton") for f in (compiled, selective_scan))
    assert_close(actual, expected, 1e-6)
    assert_same_gradients(actual, expected, list(inputs.values()), 1e-5)


def test_what_triton_does_not_compute_is_refused():
    inputs = make_scan_inputs(1, 4, 5, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"'triton' cannot run selective_scan on cpu torch.float64: float64 runs on"):
        selective_scan(**inputs, backend="triton")
