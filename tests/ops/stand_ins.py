"""Stand-ins for the packages causal-conv1d and mamba-ssm, on the CPU, with their signatures and demands."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.machinery
import sys
import types
from collections.abc import Iterator

import pytest
import torch

import vim
from tests.backends import ALL
from vim.ops import selective_scan
from vim.ops.backends.mamba_ssm import BACKEND
from vim.ops.backends.registry import isolated_registry, register_backend


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


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Put stand-ins in the place of both packages, and have the backend run on the CPU, inside a `with` block."""
    contents = {
        "causal_conv1d": {"causal_conv1d_fn": causal_conv1d_fn, "__version__": "1.7.0"},
        "mamba_ssm": {"__version__": "2.3.2.post1"},
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": selective_scan_fn},
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.layer_norm": {"rms_norm_fn": rms_norm_fn},
    }
    with pytest.MonkeyPatch.context() as patch, isolated_registry(ALL - {BACKEND.name}):
        for name, members in contents.items():
            module = types.ModuleType(name)
            module.__dict__.update(members)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            patch.setitem(sys.modules, name, module)
        register_backend(dataclasses.replace(BACKEND, why_not=_why_not_on_a_gpu))
        yield


def _why_not_on_a_gpu(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    return BACKEND.why_not(op, torch.device("cuda"), dtype)
