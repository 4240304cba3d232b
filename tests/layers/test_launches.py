"""What a layer asks of a GPU, counted without one: tensors pretend to be there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import vim
from vim.layers.norm import RMSNorm

# Views and allocations start no kernel.
_FREE = ("aten::view", "aten::_unsafe_view", "aten::empty", "aten::new_empty", "prim::device")


class _Launches(TorchDispatchMode):
    """The ops that start kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and not func.name().startswith(_FREE):
            # Without a GPU the native backend steps aside for Triton's; both start one kernel an op.
            self.names.append(func.name().partition(".")[0].partition("::")[2].removesuffix("_triton"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward(dtype):
    """Eight at most: in float32 seven, in half precision one more that converts all weights of the mixer."""
    with FakeTensorMode(), torch.no_grad():
        block = vim.Block(vim.Mamba(192, device="cuda", dtype=dtype), RMSNorm(192, device="cuda", dtype=dtype))
        x, residual = torch.randn(2, 197, 192, device="cuda", dtype=dtype), torch.randn(2, 197, 192, device="cuda")
        with _Launches() as launches:
            block(x, residual)
    conversion = [] if dtype is torch.float32 else ["_foreach_copy_"]
    products = ["mm", "mm"]  # x_proj of both directions
    assert launches.names == [
        "add_rms_norm",
        "mm",
        *conversion,
        "bidirectional_conv1d",
        *products,
        "bidirectional_scan",
        "mm",
    ]
