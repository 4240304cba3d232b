"""A linear layer on the fastest product at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vim.ops import forget_packed, linear


class Linear(nn.Linear):
    """PyTorch's linear layer in all but speed; see `vim.ops.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(input, self.weight, self.bias)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Linear:
        """Move or cast, as every module does; what was packed of the weight is given back first."""
        weight = self._parameters.get("weight")
        if weight is not None:
            forget_packed(weight)
        return super()._apply(fn, recurse)
