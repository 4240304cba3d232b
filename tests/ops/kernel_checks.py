"""Checks of one family of kernels against the reference, op by op."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Largest difference relative to the largest magnitude. Half: one unit in the last place of the result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 1e-12}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 9) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run_op(name: str, *args: object) -> tuple[torch.Tensor, ...]:
    """What `vim::name` returns, as a tuple."""
    with torch.no_grad():
        result = getattr(torch.ops.vim, name)(*args)
    return result if isinstance(result, tuple) else (result,)


class KernelChecks:
    """Checks of the ops whose names end in `suffix`."""

    def __init__(self, suffix: str) -> None:
        self.suffix = suffix

    def check(self, op: str, *args: object) -> tuple[torch.Tensor, ...]:
        """The kernel's results must agree with the reference's; returns the reference's."""
        actual, expected = run_op(op + self.suffix, *args), run_op(f"{op}_reference", *args)
        for i, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
            assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), f"{op} output {i}"
            if wanted.numel():
                error = (got.double() - wanted.double()).abs().max().item()
                bound = TOLERANCE[wanted.dtype] * wanted.abs().max().item() + 1e-7
                assert error <= bound, f"{op} output {i}: error {error:.3g} > {bound:.3g}"
        return expected

    def bidirectional_scan(self, tensors: Sequence[torch.Tensor], every: int) -> None:
        checkpoints = self.check("bidirectional_scan", *tensors, 0.5, every)[1]
        dy = noise(*tensors[0].shape, dtype=tensors[0].dtype)
        self.check("bidirectional_scan_backward", dy, *tensors, checkpoints, 0.5, every)
        self.check("bidirectional_scan", *tensors, 1.0, 0)

    def selective_scan(self, inputs: dict[str, torch.Tensor | None], reverse: bool, softplus: bool, every: int) -> None:
        if not softplus:  # steps must be positive, or states grow without bound
            inputs = {k: v if v is None or "delta" not in k else v.abs() / 8 for k, v in inputs.items()}
        tensors = list(inputs.values())
        settings = (softplus, reverse, every)
        _, state, checkpoints = self.check("selective_scan", *tensors, *settings)
        u = tensors[0]
        for dlast in (None, noise(*state.shape)):
            dout = noise(*u.shape, dtype=u.dtype)
            self.check("selective_scan_backward", dout, dlast, *tensors, checkpoints, *settings)
