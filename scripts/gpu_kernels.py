"""Measure each op alone: time, bandwidth, and their share of the GPU's limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vim.ops import (
    ScanOperands,
    add_rms_norm,
    available_backends,
    bidirectional_conv1d,
    bidirectional_scan,
)
from vim.runtime.gpu import captured, time_calls

# Calls rotate through several sets of inputs, together larger than any cache, so that every call reads from memory.
_BEYOND_CACHES = 256 * 2**20
_MAX_SETS = 16
# The reference launches kernels for every token: longer sequences would take longer than everything else.
_LONGEST_FOR_REFERENCE = 256
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """The work that a call cannot avoid: bytes read and written, and special functions."""

    op: str
    bytes: int
    special: int
    make: Callable[[str | None], Callable[[], object]]


def kernel_rows(
    shapes: list[Shape], dtypes: list[torch.dtype], probe: dict[str, Any], gpu: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Measure every op, forward and backward, on every available backend.

    Args:
        shapes: Sizes of layers.
        dtypes: Of the activations.
        probe: `probe_gpu()` of the same run: bytes a second are compared with its copy.
        gpu: `describe_gpu()`.
    """
    for shape in shapes:
        for dtype in dtypes:
            for kernel in kernels_of(shape, dtype):
                forward_op = kernel.op.removesuffix(" backward")
                for backend in available_backends(forward_op, "cuda", dtype):
                    if backend == "reference" and shape.len > _LONGEST_FOR_REFERENCE:
                        continue
                    yield {
                        "shape": shape.name,
                        "op": kernel.op,
                        "backend": backend,
                        "dtype": str(dtype).removeprefix("torch."),
                        **_measure(kernel, backend, probe, gpu),
                    }


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


def _measure(kernel: Kernel, backend: str, probe: dict[str, Any], gpu: dict[str, Any]) -> dict[str, Any]:
    sets = max(1, min(_MAX_SETS, math.ceil(_BEYOND_CACHES / kernel.bytes))) if backend != "reference" else 1
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls = [kernel.make(backend) for _ in range(sets)]
    if backend == "reference":
        seconds, how = time_calls(calls, repeats=1), "as called"
    else:
        try:
            seconds, how = time_calls([captured(calls, stream)]) / sets, "CUDA graph"
        except RuntimeError as error:  # a backend that synchronises with the host
            torch.cuda.synchronize()
            seconds, how = time_calls(calls), f"as called; no CUDA graph: {str(error).splitlines()[0][:120]}"
    rate = kernel.bytes / seconds / 1e9
    row: dict[str, Any] = {"microseconds": round(1e6 * seconds, 2), "gb_per_s": round(rate), "timed": how}
    row["of_copy"] = round(rate / probe["copy_gb_per_s"], 3)
    clock = gpu["clock_limit_mhz"]
    if kernel.special and isinstance(clock, float):
        limit = gpu["multiprocessors"] * _SPECIAL_PER_CLOCK * clock * 1e6
        row["of_special_functions"] = round(kernel.special / limit / seconds, 3)
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
