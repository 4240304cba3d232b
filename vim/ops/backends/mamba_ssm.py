"""The mamba_ssm backend: the original's kernels as `vim.ops`, to check and to measure other backends against.

The backward direction is a forward scan over flipped copies, and the kernels need copies with channels before tokens,
as in the original. Only public functions of causal-conv1d and mamba-ssm are called; arguments that moved between their
versions are passed by name. Those functions have gradients of their own, so the functions here are plain, not
registered ops: torch.compile breaks its graph at each. Arguments and results are as the registered ops have them, but
no entry states are saved.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vim.ops.backends.registry import Backend, Inapplicable, register_backend
from vim.ops.bidirectional_scan.operands import split_directions
from vim.ops.selective_scan.inputs import ScanInputs, is_constant, segmented

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The first versions with the argument order and the module names that are used here.
_OLDEST = {"causal_conv1d": (1, 2), "mamba_ssm": (2, 0)}


class _Functions(NamedTuple):
    """Functions of the two packages."""

    causal_conv1d: Any
    selective_scan: Any
    rms_norm: Any


def _functions() -> _Functions:
    from causal_conv1d import causal_conv1d_fn
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    from mamba_ssm.ops.triton.layer_norm import rms_norm_fn

    return _Functions(causal_conv1d_fn, selective_scan_fn, rms_norm_fn)


def selective_scan(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Run one scan, (batch, dim, len); the last state has no gradient, because the package gives it none."""
    inputs = ScanInputs(*segmented(arguments))
    u, delta, A, B, C, D, z, delta_bias, _, _, delta_softplus, reverse, _ = inputs
    if reverse:
        u, delta = u.flip(-1), delta.flip(-1)
        z = None if z is None else z.flip(-1)
        B, C = (t if is_constant(t) else _flip_tokens(t, A) for t in (B, C))
    out, last_state = _functions().selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state=True
    )
    entry = A.new_empty(u.shape[0], 0, A.shape[1], u.shape[1])
    return out.flip(-1) if reverse else out, last_state.detach(), entry


def bidirectional_scan(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Run both scans, each with its own gate, and add them."""
    *operands, z, scale, _ = arguments
    total: Any = 0
    for direction, reverse in zip(split_directions(operands), (False, True), strict=True):
        u, x_dbl, dt_weight, dt_bias, A_log, D = direction
        dt, B, C = x_dbl.split([dt_weight.shape[1], A_log.shape[1], A_log.shape[1]], dim=-1)
        delta = F.linear(dt, dt_weight.to(dt.dtype)).mT
        inputs = (u.mT, delta, -torch.exp(A_log), B.mT, C.mT, D, z.mT, dt_bias)
        total = total + selective_scan(*inputs, True, reverse, 0)[0]
    entry = A_log.new_empty(2, z.shape[0], 0, A_log.shape[1], z.shape[2])
    return (scale * total).mT.contiguous(), entry


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """Run one convolution, (batch, dim, len)."""
    x = x.flip(-1) if reverse else x
    out = _functions().causal_conv1d(x.contiguous(), weight, bias=bias, activation="silu" if silu else None)
    return out.flip(-1) if reverse else out


def bidirectional_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, weight_b: Tensor, bias_b: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run both convolutions, (batch, len, dim)."""
    out, out_b = causal_conv1d(x.mT, weight, bias, True, False), causal_conv1d(x.mT, weight_b, bias_b, True, True)
    return out.mT.contiguous(), out_b.mT.contiguous()


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Run sum and norm; the sum is float32."""
    return _functions().rms_norm(x, weight, None, residual=residual, prenorm=True, residual_in_fp32=True, eps=eps)


def _flip_tokens(B: Tensor, A: Tensor) -> Tensor:
    """Flip the tokens of B or C; with a complex A each number is a (re, im) pair."""
    return B.unflatten(-1, (-1, 2)).flip(-2).flatten(-2) if A.is_complex() else B.flip(-1)


def _why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if op not in _FUNCTIONS:
        return Inapplicable(f"it has no kernel for {op}")
    if device.type != "cuda":  # torch calls AMD's GPUs cuda, too
        return Inapplicable(f"its kernels are for GPUs, not for {device.type}")
    if dtype not in _DTYPES:
        return Inapplicable(f"its kernels do not compute in {str(dtype).removeprefix('torch.')}")
    return _why_not_importable()


def _why_not_importable() -> str | None:
    specs = {name: importlib.util.find_spec(name) for name in _OLDEST}
    stood_in = [name for name, spec in specs.items() if spec is not None and spec.origin == "vim.compat"]
    if stood_in:
        return f"vim.compat stands in for {' and '.join(stood_in)} in this process, with the kernels of other backends"
    missing = [name.replace("_", "-") for name, spec in specs.items() if spec is None]
    if missing:
        return f'{" and ".join(missing)} not installed; the extra "mamba" has both: pip install "vimamba[mamba]"'
    for name, oldest in _OLDEST.items():
        try:
            version = importlib.import_module(name).__version__
        except ImportError as error:  # built for another torch
            return f"{name} cannot be imported: {error}"
        if tuple(int(part) for part in version.split(".")[:2]) < oldest:
            return f"{name.replace('_', '-')} must be {oldest[0]}.{oldest[1]} or newer, got {version}"
    try:
        _functions()
    except ImportError as error:
        return f"a function of mamba-ssm or causal-conv1d is missing: {error}"
    return None


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "selective_scan": selective_scan,
    "bidirectional_scan": bidirectional_scan,
    "causal_conv1d": causal_conv1d,
    "bidirectional_conv1d": bidirectional_conv1d,
    "add_rms_norm": add_rms_norm,
}
BACKEND = Backend("mamba_ssm", "_mamba_ssm", _why_not, by_name_only=True, functions=_FUNCTIONS)
register_backend(BACKEND)
