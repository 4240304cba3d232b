"""Which device these tests run on, and which backends they try there."""

from __future__ import annotations

import pytest
import torch

from vim.ops import available_backends, unavailable_backends

DEVICE = torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
BACKENDS = ("native", "triton", "mamba_ssm")


def require(backend: str, op: str, dtype: torch.dtype = torch.float32) -> None:
    """Fail where the native backend does not run `op`; skip, with the reason, where another one does not."""
    if backend in available_backends(op, DEVICE, dtype):
        return
    reason = unavailable_backends(op, DEVICE, dtype).get(backend, "there is no such backend")
    if backend == "native":
        pytest.fail(f"native does not run {op}: {reason}")
    pytest.skip(f"{backend}: {reason}")
