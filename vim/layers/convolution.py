"""A convolution on the fastest product at hand."""

from __future__ import annotations

from torch import Tensor, nn

from vim.ops import goes_through_float32


class Conv2d(nn.Conv2d):
    """PyTorch's convolution in all but speed; see `vim.ops.goes_through_float32`."""

    def forward(self, input: Tensor) -> Tensor:
        """(batch, in_channels, height, width) -> (batch, out_channels, rows, columns)."""
        if not goes_through_float32(input, self.weight):
            return super().forward(input)
        bias = None if self.bias is None else self.bias.float()
        return self._conv_forward(input.float(), self.weight.float(), bias).to(input.dtype)
