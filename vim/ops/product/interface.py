"""`project`: the product of a linear layer, on the threads of the other kernels. It has no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from vim.ops.backends.registry import runs_by_default
from vim.ops.common.eager import is_eager


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x weight^T + bias, for operands that `runs_projection` accepts.

    Args:
        x: (rows, in_features).
        weight: (out_features, in_features), in the dtype of `x`.
        bias: (out_features,) or `None`.

    Returns:
        (rows, out_features), in the dtype of `x`; sums are float32.
    """
    out = x.new_empty(x.shape[0], weight.shape[0])
    torch.ops.vim.product_(x, weight.mT, None if bias is None else bias.float(), False, out)
    return out


def runs_projection(x: Tensor) -> bool:
    """Return True if the CPU kernels multiply such rows by a weight, and nothing records or watches what runs."""
    return bool(
        type(x) is Tensor
        and x.dim() == 2
        and x.is_cpu
        and is_eager()
        and torch._C._len_torch_dispatch_stack() == 0  # such as a counter of FLOPs, which does not know the op
        and not torch.is_autocast_enabled("cpu")
        and runs_by_default("product_", "native", x)
    )
