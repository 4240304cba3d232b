"""Run every op once, each in a process of its own: an illegal access ends that process and no other.

python -m scripts.gpu.smoke bidirectional_scan backward bfloat16     # one case; racecheck and memcheck run it, too
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from scripts.gpu.record import Row, Section, Unavailable

OPS = (
    "add_rms_norm",
    "bidirectional_conv1d",
    "bidirectional_scan",
    "bidirectional_block",
    "causal_conv1d",
    "selective_scan",
)
CASES = [(op, side, dtype) for side in ("forward", "backward") for op in OPS for dtype in ("bfloat16", "float32")]
_AT_A_TIME = 8
# Largest differences from the reference on the processor, relative to the largest magnitude; tests/gpu is stricter.
_BOUND = {"float32": 1e-4, "bfloat16": 4e-2}
# Seconds for the cases of a round; processors without a GPU may be few and busy.
_LIMIT, _LIMIT_OF_REHEARSAL = 30.0, 600.0


def smoke(section: Section) -> None:
    """Run all cases, eight at a time, with launches that wait; a case that fails again under compute-sanitizer."""
    failed: list[tuple[str, str, str]] = []
    at_a_time = _AT_A_TIME if section.gpu or section.speed else min(4, os.cpu_count() or 1)
    rounds = [CASES[i : i + at_a_time] for i in range(0, len(CASES), at_a_time)]
    for number, cases in enumerate(rounds, 1):
        run = partial(_round, cases, section.gpu, failed)
        section.run(f"round {number} of {len(rounds)}", 8.0, run, run)
    for case in failed[:2]:
        section.run(f"{' '.join(case)} under memcheck", 10.0, partial(sanitized, case, "memcheck", 30.0))


def sanitized(case: tuple[str, str, str], tool: str, limit: float) -> Iterator[Row]:
    """Run a case under a tool of compute-sanitizer and yield what it says."""
    program = find_tool("compute-sanitizer")
    if program is None:
        raise Unavailable("compute-sanitizer is not installed")
    command = [program, "--tool", tool, "--print-limit", "3", *_command(case)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("=========")]
    clean = any("0 errors" in line or "0 hazards" in line for line in said)
    yield {"case": " ".join(case), "tool": tool, "ok": clean, "said": said[-40:]}


def find_tool(name: str) -> str | None:
    """Return the path of a tool of the CUDA toolkit."""
    places = [
        shutil.which(name),
        *sorted(map(str, Path("/opt/nvidia").glob(f"*/*/{name}"))),
        f"/usr/local/cuda/bin/{name}",
    ]
    return next((place for place in places if place and os.access(place, os.X_OK)), None)


def _command(case: tuple[str, str, str]) -> list[str]:
    return [sys.executable, "-m", "scripts.gpu.smoke", *case]


def _round(cases: list[tuple[str, str, str]], gpu: bool, failed: list[tuple[str, str, str]]) -> Iterator[Row]:
    environment = {**os.environ, "CUDA_LAUNCH_BLOCKING": "1", "OMP_NUM_THREADS": "1"}
    deadline = time.monotonic() + (_LIMIT if gpu else _LIMIT_OF_REHEARSAL)
    processes = {
        case: subprocess.Popen(
            [*_command(case), *([] if gpu else ["--device", "cpu"])],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for case in cases
    }
    for case, process in processes.items():
        try:
            out, err = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        row: Row = {"case": " ".join(case), "ok": process.returncode == 0, "exit_code": process.returncode}
        row |= json.loads(out.splitlines()[-1]) if process.returncode in (0, 1) and out.strip().endswith("}") else {}
        if not row["ok"]:
            failed.append(case)
            row["said"] = err.strip().splitlines()[-2:]
        yield row


# ---- one case ----------------------------------------------------------------------------------------------------


def errors(op: str, side: str, dtype: str, device: str) -> list[float]:
    """Return the differences of an op's results on `device` from the reference's on the processor."""
    import torch

    results = []
    for place, backend in ((device, "native"), ("cpu", "reference")):
        torch.manual_seed(0)
        call, leaves = _inputs(op, getattr(torch, dtype), place)
        outputs = call(backend)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if side == "backward":
            cotangents = [torch.randn(y.shape).to(y) for y in outputs]
            outputs = torch.autograd.grad(outputs, leaves, cotangents)
        results.append([t.detach().double().cpu() for t in outputs])
    return [
        ((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-7)).item()
        for got, wanted in zip(*results, strict=True)
    ]


def _inputs(op: str, dtype: Any, device: str) -> tuple[Callable[[str], Any], list[Any]]:
    """Return a function that runs the op on a backend, and the tensors whose gradients count."""
    import torch

    from vim import ops

    batch, length, dim, d_state, rank = 2, 197, 384, 16, 12
    leaves: list[torch.Tensor] = []

    def leaf(*size: int, scale: float = 1.0, shift: float = 0.0, of: torch.dtype = dtype) -> torch.Tensor:
        tensor = (torch.randn(size) * scale + shift).to(of).to(device).requires_grad_()
        leaves.append(tensor)
        return tensor

    single = partial(leaf, of=torch.float32)
    if op == "add_rms_norm":
        x, residual, weight = leaf(batch, length, 192), single(batch, length, 192), single(192)
        return lambda backend: ops.add_rms_norm(x, residual, weight, backend=backend), leaves
    if op == "bidirectional_conv1d":
        x, weights = leaf(batch, length, dim), [single(dim, 4), single(dim), single(dim, 4), single(dim)]
        return lambda backend: ops.bidirectional_conv1d(x, *weights, backend=backend), leaves
    if op == "causal_conv1d":
        x, weight, bias = leaf(batch, dim, length), single(dim, 4), single(dim)
        return lambda backend: ops.causal_conv1d(x, weight, bias, backend=backend), leaves
    if op == "selective_scan":
        u, delta = leaf(batch, dim, length), leaf(batch, dim, length, scale=0.1, shift=-3)
        A = single(dim, d_state, scale=0.1, shift=-2)
        B, C = leaf(batch, d_state, length), leaf(batch, d_state, length)
        return lambda backend: ops.selective_scan(u, delta, A, B, C, delta_softplus=True, backend=backend), leaves
    if op == "bidirectional_block":
        x, residual = leaf(batch, length, 192), single(batch, length, 192)

        def direction() -> list[torch.Tensor]:
            inner = [leaf(dim, 1, 4, scale=0.5), leaf(dim), leaf(rank + 2 * d_state, dim, scale=dim**-0.5)]
            step = [leaf(dim, rank, scale=rank**-0.5), single(dim, shift=-4)]
            return [*inner, *step, single(dim, d_state, scale=0.1, shift=1), single(dim)]

        first = [leaf(192), leaf(2 * dim, 192, scale=192**-0.5), None, *direction(), *direction()]
        weights = ops.BlockWeights(*first, leaf(192, dim, scale=dim**-0.5), None)
        return lambda backend: ops.bidirectional_block(x, residual, weights, backend=backend), leaves

    def side() -> ops.ScanOperands:
        return ops.ScanOperands(
            leaf(batch, length, dim),
            leaf(batch, length, rank + 2 * d_state),
            single(dim, rank, scale=rank**-0.5),
            single(dim, shift=-4),
            single(dim, d_state, scale=0.1, shift=1),
            single(dim),
        )

    forward, backward, z = side(), side(), leaf(batch, length, dim)
    return lambda backend: ops.bidirectional_scan(forward, backward, z, backend=backend), leaves


def main() -> int:
    """Run one case and print its largest difference; return 1 if it is too large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=OPS)
    parser.add_argument("side", choices=("forward", "backward"))
    parser.add_argument("dtype", choices=list(_BOUND))
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    start = time.monotonic()
    found = errors(options.op, options.side, options.dtype, options.device)
    worst = max(found)
    print(json.dumps({"error": float(f"{worst:.2g}"), "seconds": round(time.monotonic() - start, 1)}))
    if not worst <= _BOUND[options.dtype]:
        print(f"differences of the results: {[float(f'{error:.2g}') for error in found]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
