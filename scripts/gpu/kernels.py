"""The table of kernels: every op of a layer alone, beside the limits of the card."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from scripts.gpu.record import Row, Section

# Names of the shapes in scripts/gpu/ops.py, which imports torch.
SHAPES = ("Ti 224 b128", "S 224 b128", "B 224 b64", "Ti 1248 b4", "Ti 1248 b32", "Ti 224 b1")


def kernels(section: Section) -> None:
    """Measure every op of the layer, forward and backward, on the native kernels."""
    limits: dict[str, float] = {}

    def card() -> Iterator[Row]:
        from scripts.gpu.ops import limits_of_card

        limits.update(limits_of_card())
        section.fact(**limits)
        yield from ()

    section.run("limits of the card", 2.0, card, _rehearse)
    for name in SHAPES:
        section.run(name, 4.0, partial(_rows, name, limits))


def _rows(name: str, limits: dict[str, float]) -> Iterator[Row]:
    import torch

    from scripts.gpu.ops import SHAPES, kernel_rows

    yield from kernel_rows(SHAPES[name], torch.bfloat16, "native", limits)


def _rehearse() -> Iterator[Row]:
    """Run every op on the processor."""
    import torch

    from scripts.gpu.ops import REHEARSAL, kernels_of

    for kernel in kernels_of(REHEARSAL, torch.float32, "cpu"):
        kernel.make(None)()
        yield {"step": "rehearsal on the processor", "op": kernel.op, "bytes": kernel.bytes}
