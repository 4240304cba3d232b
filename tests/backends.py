"""What tests ask of the registry of backends."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vim.ops.backends.registry import resolve_backend

# All of this library and of its tests; `tests/emulated.py` has the last one.
ALL = {"native", "triton", "reference", "mamba_ssm", "emulated"}


def chosen_op(op: str, backend: str | None, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return what runs an op on tensors of a device, which this machine may lack."""
    with FakeTensorMode():
        tensor = torch.empty(1, device=device, dtype=dtype)
    return resolve_backend(op, backend, tensor)
