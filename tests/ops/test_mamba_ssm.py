"""What only the mamba_ssm backend has, over stand-ins of its packages, beside the cases of `test_conformance.py`."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

import vim
from tests.backends import chosen_op
from tests.helpers import TOLERANCES, assert_close, assert_same_gradients, make_bidirectional_inputs, make_scan_inputs
from tests.ops import stand_ins
from vim.layers.norm import RMSNorm
from vim.ops import ScanOperands, bidirectional_scan, default_backend, selective_scan


@pytest.fixture
def packages():
    with stand_ins.installed():
        yield


@pytest.mark.parametrize("merge", ["mean", "sum"])
def test_bidirectional_scan_in_half_precision(merge, packages):
    tensors = make_bidirectional_inputs(2, 19, 6, 4, 3, dtype=torch.bfloat16)

    def scan(backend: str) -> torch.Tensor:
        return bidirectional_scan(
            ScanOperands(*tensors[:6]), ScanOperands(*tensors[6:12]), tensors[12], merge, backend=backend
        )

    actual, expected = scan("mamba_ssm"), scan("reference")
    assert actual.dtype == torch.bfloat16
    assert actual.is_contiguous()
    # This path rounds delta and the result of each direction, as the original does.
    assert_close(actual, expected, 4 * TOLERANCES[torch.bfloat16].value)
    assert_same_gradients(actual, expected, tensors, 4 * TOLERANCES[torch.bfloat16].gradient)


def test_a_complex_scan(packages):
    rng = torch.Generator().manual_seed(3)
    inputs = make_scan_inputs(2, 4, 9, 3)
    inputs["A"] = torch.complex(-torch.rand(4, 3, generator=rng), torch.rand(4, 3, generator=rng)).requires_grad_()
    inputs.update({n: torch.randn(2, 3, 18, generator=rng, requires_grad=True) for n in ("B", "C")})
    settings = {"delta_softplus": True, "return_last_state": True, "reverse": True}
    actual, state = selective_scan(**inputs, **settings, backend="mamba_ssm")
    expected, expected_state = selective_scan(**inputs, **settings, backend="reference")
    assert_close(actual, expected, 2e-6)
    assert_close(state, expected_state, 2e-6)
    assert not state.requires_grad
    assert_same_gradients(actual, expected, list(inputs.values()), 2e-5)


def test_a_block_of_a_model(packages):
    torch.manual_seed(0)
    block = vim.Block(vim.Mamba(16), RMSNorm(16))
    x = torch.randn(2, 9, 16, requires_grad=True)
    results = []
    for backend in ("mamba_ssm", "reference"):
        with default_backend(backend):
            out = torch.cat(block(*block(x)))
            results.append([out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])])
    for got, wanted in zip(*results, strict=True):
        assert_close(got, wanted, 2e-5)


def test_it_is_never_the_default(packages):
    for op in ("selective_scan", "bidirectional_scan", "causal_conv1d", "bidirectional_conv1d", "add_rms_norm"):
        assert "mamba_ssm" in vim.ops.available_backends(op)
        assert chosen_op(op, None, "cpu") is not chosen_op(op, "mamba_ssm", "cpu")


def test_reasons_without_the_packages(monkeypatch):
    assert "for GPUs, not for cpu" in vim.ops.unavailable_backends("selective_scan")["mamba_ssm"]
    assert "float64" in vim.ops.unavailable_backends("selective_scan", "cuda", torch.float64)["mamba_ssm"]
    for name in ("causal_conv1d", "mamba_ssm"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reason = vim.ops.unavailable_backends("selective_scan", "cuda")["mamba_ssm"]
    assert reason.startswith('causal-conv1d and mamba-ssm not installed; the extra "mamba"')


def test_reasons_with_other_packages(packages, monkeypatch):
    def reason() -> str:
        return vim.ops.unavailable_backends("selective_scan")["mamba_ssm"]

    monkeypatch.setattr(sys.modules["causal_conv1d"], "__version__", "1.1.3.post1")
    assert reason() == "causal-conv1d must be 1.2 or newer, got 1.1.3.post1"
    monkeypatch.setattr(sys.modules["causal_conv1d"], "__version__", "1.7.0")
    monkeypatch.delattr(sys.modules["mamba_ssm.ops.selective_scan_interface"], "selective_scan_fn")
    assert "cannot import name 'selective_scan_fn'" in reason()
    with pytest.raises(RuntimeError, match="'mamba_ssm' cannot run selective_scan on cpu"):
        selective_scan(**make_scan_inputs(1, 2, 3, 2), backend="mamba_ssm")
