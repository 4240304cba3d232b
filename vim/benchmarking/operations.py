"""Benchmark of the scan and the convolution beside other implementations, interleaved in one process."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vim.benchmarking.measuring import interleave, probe_machine, summarise
from vim.benchmarking.report import make_record, write_record
from vim.ops import causal_conv1d, selective_scan

# (dim, len, d_state): Vim-Ti at 224 px, the 130M language model's prefill, Vim-S at 512 px.
SHAPES = ((384, 197, 16), (1536, 512, 16), (768, 1025, 16))
_WIDTH = 4
Call = Callable[[], Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class OpRow:
    """One measurement; seconds are of one call, forward, batch 1, float32."""

    op: str
    implementation: str
    shape: tuple[int, int, int]
    rounds: int
    seconds_median: float
    seconds_min: float
    largest_error: float


def compare_ops(rounds: int, seconds: float, threads: int, output: str) -> None:
    """Measure the ops and print a table; `run_ops_benchmark` describes the arguments."""
    if threads:
        torch.set_num_threads(threads)
    rows, missing, probes = [], {}, [probe_machine()]
    for op, calls_at in (("selective_scan", _scans), ("causal_conv1d", _convolutions)):
        for shape in SHAPES:
            calls, absent = calls_at(*shape)
            missing.update(absent)
            rows += _measure(op, shape, calls, rounds, seconds)
            probes.append(probe_machine())
    record = make_record(rows, probes, missing)
    sys.stdout.write(write_record(record, _table(record["rows"]), output) + "\n")


@torch.inference_mode()
def _measure(op: str, shape: tuple[int, int, int], calls: dict[str, Call], rounds: int, seconds: float) -> list[OpRow]:
    outputs = {name: call() for name, call in calls.items()}
    first = next(iter(outputs.values()))
    times = interleave(calls, rounds, seconds)
    return [
        OpRow(
            op=op,
            implementation=name,
            shape=shape,
            largest_error=(outputs[name] - first).abs().max().item(),
            **summarise(taken),
        )
        for name, taken in times.items()
    ]


def _scans(dim: int, seqlen: int, d_state: int) -> tuple[dict[str, Call], dict[str, str]]:
    generator = torch.Generator().manual_seed(0)
    u, delta = (torch.randn(1, dim, seqlen, generator=generator) for _ in range(2))
    delta = F.softplus(delta - 3)
    A = -torch.arange(1.0, d_state + 1).expand(dim, -1).contiguous()
    B, C = (torch.randn(1, d_state, seqlen, generator=generator) for _ in range(2))
    D = torch.ones(dim)
    calls: dict[str, Call] = {
        "vim": lambda: selective_scan(u, delta, A, B, C, D),
        "vim, reference": lambda: selective_scan(u, delta, A, B, C, D, backend="reference"),
        "torch associative_scan": lambda: _associative(u, delta, A, B, C, D),
    }
    missing: dict[str, str] = {}
    slow = _slow_path("mamba_selective_scan", missing)
    if slow is not None:
        calls["transformers, slow path"] = lambda: slow(u, delta, A, B, C, D=D)
    pscan = _optional("mambapy.pscan", "pscan", "mambapy", missing)
    if pscan is not None:
        calls["mambapy"] = lambda: _with_pscan(pscan, u, delta, A, B, C, D)
    return calls, missing


def _convolutions(dim: int, seqlen: int, d_state: int) -> tuple[dict[str, Call], dict[str, str]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, dim, seqlen, generator=generator)
    weight, bias = torch.randn(dim, _WIDTH, generator=generator), torch.randn(dim, generator=generator)
    calls: dict[str, Call] = {
        "vim": lambda: causal_conv1d(x, weight, bias, "silu"),
        "torch conv1d": lambda: F.silu(
            F.conv1d(x, weight[:, None], bias, padding=_WIDTH - 1, groups=dim)[..., :seqlen]
        ),
    }
    missing: dict[str, str] = {}
    slow = _slow_path("causal_conv1d_fn", missing)
    if slow is not None:
        calls["transformers, slow path"] = lambda: slow(x, weight, bias, activation="silu")
    mojo = _optional("causal_conv1d_mojo", "causal_conv1d_fn", "causal-conv1d-mojo", missing)
    if mojo is not None:
        calls["causal-conv1d-mojo"] = lambda: mojo(x, weight, bias, activation="silu")
    return calls, missing


def _slow_path(function: str, missing: dict[str, str]) -> Callable[..., Any] | None:
    """Return a function of transformers' Mamba in plain PyTorch; `None` where its fast path is installed, too."""
    found = _optional("transformers.models.mamba.modeling_mamba", function, "transformers", missing)
    slow = getattr(found, "__wrapped__", found)
    if found is not None and importlib.util.find_spec("mamba_ssm") is not None:
        missing["transformers, slow path"] = "mamba_ssm is there, so transformers takes its fast path"
        return None
    return slow


def _optional(module: str, name: str, package: str, missing: dict[str, str]) -> Callable[..., Any] | None:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        missing[package] = str(error)
        return None


def _discretise(u: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of the recurrence, (batch, len, dim, d_state) each."""
    steps = delta.mT[..., None]
    return torch.exp(steps * A), steps * u.mT[..., None] * B.mT[:, :, None]


def _associative(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], left[1] * right[0] + right[1]

    _, h = associative_scan(combine, _discretise(u, delta, A, B), dim=1, combine_mode="generic")
    return torch.einsum("blds,bsl->bdl", h, C) + D[:, None] * u


def _with_pscan(pscan: Callable[..., Any], u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Any:
    return torch.einsum("blds,bsl->bdl", pscan(*_discretise(u, delta, A, B)), C) + D[:, None] * u


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| op | (dim, len, d_state) | implementation | ms, median (least) | time / vim | difference |"]
    lines += ["|---|---|---|---|---|---|"]
    own = {(row["op"], tuple(row["shape"])): row for row in reversed(rows) if row["implementation"] == "vim"}
    for row in rows:
        ratio = row["seconds_median"] / own[row["op"], tuple(row["shape"])]["seconds_median"]
        milliseconds = f"{1e3 * row['seconds_median']:.2f} ({1e3 * row['seconds_min']:.2f}, n={row['rounds']})"
        error = f"{row['largest_error']:.1e}"
        cells = [row["op"], str(tuple(row["shape"])), row["implementation"], milliseconds, f"{ratio:.1f}", error]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
