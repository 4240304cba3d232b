"""Measure each op alone: time, bandwidth, and their share of the GPU's limits.

python -m scripts.gpu.ops --profile "bidirectional_scan backward"     # one call, for ncu
python -m scripts.gpu.ops --table                                     # rows of JSON, for a library's variants
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scripts.gpu.record import Row, reason
from vim.ops import (
    ScanOperands,
    add_rms_norm,
    available_backends,
    bidirectional_conv1d,
    bidirectional_scan,
)
from vim.runtime.gpu import captured, describe_gpu, probe_gpu, time_calls

# Calls rotate through several sets of inputs, together larger than any cache, so that every call reads from memory.
_BEYOND_CACHES = 256 * 2**20
_MAX_SETS = 16
# Special functions (exponentials, reciprocals) of a multiprocessor per clock.
_SPECIAL_PER_CLOCK = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of one layer; the inner width is twice `d_model`."""

    name: str
    batch: int
    len: int
    d_model: int
    d_state: int = 16

    @property
    def dim(self) -> int:
        """Inner width."""
        return 2 * self.d_model

    @property
    def dt_rank(self) -> int:
        """Rank of the step size's projection, as in the models."""
        return math.ceil(self.d_model / 16)

    @property
    def tokens(self) -> int:
        """Tokens of the whole batch."""
        return self.batch * self.len


# Layers of the models, by name.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="Ti 224 b128", batch=128, len=197, d_model=192),
        Shape(name="S 224 b128", batch=128, len=197, d_model=384),
        Shape(name="B 224 b64", batch=64, len=197, d_model=768),
        Shape(name="Ti 1248 b4", batch=4, len=6085, d_model=192),
        Shape(name="Ti 1248 b32", batch=32, len=6085, d_model=192),
        Shape(name="Ti 224 b1", batch=1, len=197, d_model=192),
        Shape(name="Ti 224 b16", batch=16, len=197, d_model=192),
        Shape(name="Ti 1248 b1", batch=1, len=6085, d_model=192),
    )
}
REHEARSAL = Shape(name="rehearsal", batch=1, len=5, d_model=16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """The work that a call cannot avoid: bytes read and written, and special functions."""

    op: str
    bytes: int
    special: int
    make: Callable[[str | None], Callable[[], object]]


def limits_of_card() -> dict[str, float]:
    """Return what this card can do: copies and products as measured, memory and special functions by its clocks."""
    card, told = torch.cuda.get_device_properties(torch.cuda.current_device()), describe_gpu()
    limits = {key: value for key, value in probe_gpu().items() if isinstance(value, int | float)}
    # Two transfers a clock (kHz), of the bus's width in bits.
    limits["memory_gb_per_s"] = round(2 * card.memory_clock_rate * card.memory_bus_width / 8 / 1e6)
    if isinstance(told["clock_limit_mhz"], float):
        limits["special_per_s"] = card.multi_processor_count * _SPECIAL_PER_CLOCK * told["clock_limit_mhz"] * 1e6
    return limits


def kernel_rows(shape: Shape, dtype: torch.dtype, backend: str, limits: dict[str, float]) -> Iterator[Row]:
    """Measure every op, forward and backward; an op that fails has a row that says why.

    Args:
        shape: Sizes of a layer.
        dtype: Dtype of the activations.
        backend: Name of the backend.
        limits: `limits_of_card()` of the same process; empty: times alone.
    """
    for kernel in kernels_of(shape, dtype):
        row = {"shape": shape.name, "op": kernel.op, "backend": backend, "dtype": str(dtype).removeprefix("torch.")}
        if backend not in available_backends(kernel.op.removesuffix(" backward"), "cuda", dtype):
            yield {**row, "ok": False, "why": "the backend is not there"}
            continue
        try:
            yield row | _measure(kernel, backend, limits)
        except Exception as error:  # whatever a compiler or a driver raises
            yield {**row, "ok": False, "why": reason(error)}
            torch.cuda.synchronize()  # raises where the GPU takes no more work from this process


def kernels_of(shape: Shape, dtype: torch.dtype, device: str = "cuda") -> Iterator[Kernel]:
    """Return the ops of one layer with the work that each cannot avoid."""
    size, tokens = dtype.itemsize, shape.tokens
    inner = tokens * shape.dim
    x_dbl = tokens * (shape.dt_rank + 2 * shape.d_state) * size
    # Per channel-step: one exponential per state, one in softplus, and half of the gate's two.
    steps = 2 * inner * (shape.d_state + 2)
    entry_states = 2 * shape.batch * math.ceil(shape.len / 64) * shape.d_state * shape.dim * 4
    forward = (
        ("add_rms_norm", _norm, tokens * shape.d_model * (2 * size + 8), 0),
        ("bidirectional_conv1d", _conv, 3 * inner * size, 4 * inner),
        ("bidirectional_scan", _scan, 4 * inner * size + 2 * x_dbl, steps),
    )
    backward = (
        ("add_rms_norm", _norm, tokens * shape.d_model * (size + 12), 0),
        ("bidirectional_conv1d", _conv, 4 * inner * size, 4 * inner),
        ("bidirectional_scan", _scan, 7 * inner * size + 4 * x_dbl + entry_states, 2 * steps),
    )
    for op, inputs, bytes_, special in forward:
        make = partial(_forward_call, inputs, shape, dtype, device)
        yield Kernel(op=op, bytes=bytes_, special=special, make=make)
    for op, inputs, bytes_, special in backward:
        make = partial(_backward_call, inputs, shape, dtype, device)
        yield Kernel(op=f"{op} backward", bytes=bytes_, special=special, make=make)


def _measure(kernel: Kernel, backend: str, limits: dict[str, float]) -> Row:
    sets = max(1, min(_MAX_SETS, math.ceil(_BEYOND_CACHES / kernel.bytes)))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls = [kernel.make(backend) for _ in range(sets)]
    seconds = time_calls([captured(calls, stream)], repeats=10) / sets
    rate = kernel.bytes / seconds / 1e9
    row: Row = {"microseconds": round(1e6 * seconds, 2), "gb_per_s": round(rate)}
    if limits:
        row["of_copy"] = round(rate / limits["copy_gb_per_s"], 3)
        row["of_memory"] = round(rate / limits["memory_gb_per_s"], 3)
        special = limits.get("special_per_s")
        row["of_special_functions"] = round(kernel.special / special / seconds, 3) if special else None
    return row


def _forward_call(
    inputs: Callable[..., Any], shape: Shape, dtype: torch.dtype, device: str, backend: str | None
) -> Callable[[], object]:
    op, _ = inputs(shape, dtype, device)

    def call() -> object:
        with torch.no_grad():
            return op(backend)

    return call


def _backward_call(
    inputs: Callable[..., Any], shape: Shape, dtype: torch.dtype, device: str, backend: str | None
) -> Callable[[], object]:
    op, leaves = inputs(shape, dtype, device)
    for leaf in leaves:
        leaf.requires_grad_()
    outputs = op(backend)
    cotangents = [torch.randn_like(y) for y in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)


def _norm(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Callable[..., Any], list[Tensor]]:
    x = torch.randn(shape.batch, shape.len, shape.d_model, dtype=dtype, device=device)
    residual, weight = torch.randn_like(x, dtype=torch.float32), torch.ones(shape.d_model, device=device)
    return lambda backend: add_rms_norm(x, residual, weight, backend=backend), [x, residual, weight]


def _conv(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Callable[..., Any], list[Tensor]]:
    xz = torch.randn(shape.batch, shape.len, 2 * shape.dim, dtype=dtype, device=device)
    x = xz[..., : shape.dim]
    weights = [torch.randn(*size, device=device) for size in 2 * [(shape.dim, 4), (shape.dim,)]]
    return lambda backend: bidirectional_conv1d(x, *weights, backend=backend), [x, *weights]


def _scan(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Callable[..., Any], list[Tensor]]:
    width = shape.dt_rank + 2 * shape.d_state
    padded = -(-width // 8) * 8  # row stride, as of x_proj's output
    leaves: list[Tensor] = []

    def side() -> ScanOperands:
        u = torch.randn(shape.batch, shape.len, shape.dim, dtype=dtype, device=device)
        x_dbl = torch.randn(shape.batch, shape.len, padded, dtype=dtype, device=device)[..., :width]
        dt_weight = torch.randn(shape.dim, shape.dt_rank, device=device) * shape.dt_rank**-0.5
        dt_bias = torch.randn(shape.dim, device=device) - 4
        states = torch.arange(1, shape.d_state + 1, device=device, dtype=torch.float32)
        A_log = states.log().expand(shape.dim, -1).contiguous()
        operands = ScanOperands(u, x_dbl, dt_weight, dt_bias, A_log, torch.ones(shape.dim, device=device))
        leaves.extend(operands)
        return operands

    forward, backward = side(), side()
    xz = torch.randn(shape.batch, shape.len, 2 * shape.dim, dtype=dtype, device=device)
    z = xz[..., shape.dim :]
    return lambda backend: (bidirectional_scan(forward, backward, z, backend=backend),), [*leaves, z]


def main() -> None:
    """Run one call of an op for a profiler, or print the rows of the scans and convolutions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", metavar="OP", help="run one call between cudaProfilerStart and cudaProfilerStop")
    parser.add_argument("--table", action="store_true", help="print a row of JSON for each shape and op")
    parser.add_argument("--shape", default="Ti 224 b128", choices=list(SHAPES))
    options = parser.parse_args()
    if options.profile:
        call = next(k for k in kernels_of(SHAPES[options.shape], torch.bfloat16) if k.op == options.profile).make(
            "native"
        )
        call()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        call()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
    if options.table:
        for shape in list(SHAPES.values())[:4]:
            for row in kernel_rows(shape, torch.bfloat16, "native", {}):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
