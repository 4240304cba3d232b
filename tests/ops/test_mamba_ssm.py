"""The mamba_ssm backend, over stand-ins of the two packages with their documented signatures and demands."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types

import pytest
import torch

import vim
from tests.helpers import (
    TOLERANCES,
    assert_close,
    assert_golden,
    golden_names,
    golden_tolerances,
    gradients,
    load_golden,
    make_bidirectional_inputs,
    make_scan_inputs,
)
from vim.checkpoints.upstream import translate_mixer_args
from vim.layers.norm import RMSNorm
from vim.ops import ScanOperands, bidirectional_scan, default_backend, selective_scan
from vim.ops.backends import mamba_ssm, registry


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """Of mamba-ssm 1.0 to 2.3; the last state's gradient is not considered there."""
    assert u.dtype == delta.dtype
    assert all(t is None or t.dtype == torch.float32 for t in (D, delta_bias))
    assert B.dtype == (A.dtype if B.dim() == 2 else u.dtype)
    args = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, True)
    out, last_state = selective_scan(*args, backend="reference")
    return (out, last_state.detach()) if return_last_state else out


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """Of causal-conv1d 1.2 to 1.7: what stood third to last before stands last."""
    assert activation in (None, "silu", "swish")
    assert seq_idx is initial_states is final_states_out is None
    assert x.is_contiguous()
    assert 2 <= weight.shape[1] <= 4, "causal_conv1d only supports width between 2 and 4"
    return vim.ops.causal_conv1d(x, weight, bias, activation, backend="reference")


def rms_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
    return_dropout_mask=False,
):
    """Of mamba-ssm 2.0 to 2.3."""
    assert bias is x1 is rowscale is None
    assert prenorm
    assert residual_in_fp32
    return vim.ops.add_rms_norm(x, residual, weight, eps, backend="reference")


@pytest.fixture(autouse=True)
def _fresh():
    registry._choose.cache_clear()
    yield
    registry._choose.cache_clear()


@pytest.fixture
def packages(monkeypatch):
    """Stand-ins for both packages, on the CPU."""
    contents = {
        "causal_conv1d": {"causal_conv1d_fn": causal_conv1d_fn, "__version__": "1.7.0"},
        "mamba_ssm": {"__version__": "2.3.2.post1"},
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": selective_scan_fn},
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.layer_norm": {"rms_norm_fn": rms_norm_fn},
    }
    for name, members in contents.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(mamba_ssm, "_DEVICES", ("cpu",))


@pytest.mark.parametrize("case", golden_names("mixer"))
def test_golden_mixer(case, packages):
    metadata, tensors = load_golden("mixer", case)
    mixer = vim.Mamba(int(metadata["d_model"]), **translate_mixer_args(**json.loads(metadata["config"])))
    mixer.load_state_dict({k.removeprefix("param."): t for k, t in tensors.items() if k.startswith("param.")})
    x = tensors["x"].requires_grad_()
    with default_backend("mamba_ssm"):
        out = mixer(x)
        (out * tensors["cotangent"]).sum().backward()
    listed = golden_tolerances(f"mixer/{case}")
    assert_golden(out, tensors["out64"], listed["out"], "out")
    assert_golden(x.grad, tensors["grad.x"], listed["grad.x"], "grad.x")
    for name, parameter in mixer.named_parameters():
        key = f"grad.param.{name}"
        assert_golden(parameter.grad, tensors[key], listed[key], key)


@pytest.mark.parametrize("merge", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bidirectional_scan(merge, dtype, packages):
    tensors = make_bidirectional_inputs(2, 19, 6, 4, 3, dtype=dtype)

    def scan(backend: str) -> torch.Tensor:
        return bidirectional_scan(
            ScanOperands(*tensors[:6]), ScanOperands(*tensors[6:12]), tensors[12], merge, backend=backend
        )

    actual, expected = scan("mamba_ssm"), scan("reference")
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    # In half precision this path rounds delta and the result of each direction, as the original does.
    factor = 1 if dtype == torch.float32 else 4
    assert_close(actual, expected, factor * TOLERANCES[dtype][0])
    for got, wanted in zip(gradients(actual, tensors), gradients(expected, tensors), strict=True):
        assert_close(got, wanted, factor * TOLERANCES[dtype][1])


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("kind", ["plain", "bare", "grouped", "constant", "complex"])
def test_selective_scan(kind, reverse, packages):
    rng = torch.Generator().manual_seed(3)
    inputs = make_scan_inputs(2, 4, 9, 3)
    if kind == "bare":
        inputs.update(D=None, z=None, delta_bias=None)
    if kind == "grouped":
        inputs["B"] = torch.randn(2, 2, 3, 9, generator=rng, requires_grad=True)
    if kind == "constant":
        inputs["C"] = torch.randn(4, 3, generator=rng, requires_grad=True)
    if kind == "complex":
        inputs["A"] = torch.complex(-torch.rand(4, 3, generator=rng), torch.rand(4, 3, generator=rng)).requires_grad_()
        inputs.update({n: torch.randn(2, 3, 18, generator=rng, requires_grad=True) for n in ("B", "C")})
    settings = {"delta_softplus": True, "return_last_state": True, "reverse": reverse}
    actual, state = selective_scan(**inputs, **settings, backend="mamba_ssm")
    expected, expected_state = selective_scan(**inputs, **settings, backend="reference")
    assert_close(actual, expected, 2e-6)
    assert_close(state, expected_state, 2e-6)
    assert not state.requires_grad
    leaves = [t for t in inputs.values() if t is not None]
    for got, wanted in zip(gradients(actual, leaves), gradients(expected, leaves), strict=True):
        assert_close(got, wanted, 2e-5)


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
    for op in mamba_ssm._FUNCTIONS:
        assert vim.ops.available_backends(op)[-1] == "mamba_ssm"
        assert registry._suffix(op, None, "cpu", torch.float32) != "_mamba_ssm"


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
