"""The forward scan cut in every way, and libraries compiled in several ways."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from scripts.gpu.record import Row, Section

# Names of the shapes in scripts/gpu/ops.py, the most valuable first.
SHAPES = (
    "Ti 224 b128",
    "Ti 1248 b1",
    "Ti 224 b1",
    "Ti 1248 b4",
    "S 224 b128",
    "Ti 1248 b32",
    "B 224 b64",
    "Ti 224 b16",
)
CHUNKS = (128, 192, 320, 512, 1024)


def tune(section: Section) -> None:
    """Time the forward scan with every choice of vim_cuda_tune_scan, and write the best as rows of its table."""
    best: list[Row] = []
    for name in SHAPES:
        section.run(name, 3.5, partial(_sweep, name, best))
    if best:
        section.row(paste=table(best))


def choices(length: int) -> list[tuple[int, int, int]]:
    """Return (channels of a thread, warps, chunk) that differ for this many tokens."""
    cut = [chunk for chunk in CHUNKS if chunk < length]
    return [(channels, warps, chunk) for channels in (1, 2) for warps in (1, 2, 4) for chunk in [_UNCUT, *cut]]


# A chunk longer than every sequence here: not cut.
_UNCUT = 2**20
# Leaves everything to the table.
_TABLE = (0, 0, 0)


def _sweep(name: str, best: list[Row]) -> Iterator[Row]:
    import ctypes

    import torch

    from scripts.gpu.ops import SHAPES, kernels_of
    from vim.ops.backends import native
    from vim.runtime.gpu import captured, time_calls

    reason = native.cuda.load()
    if reason is not None:
        raise RuntimeError(reason)
    set_choice = ctypes.CDLL(str(native.cuda.path)).vim_cuda_tune_scan
    set_choice.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    layer = SHAPES[name]
    scan = next(k for k in kernels_of(layer, torch.bfloat16) if k.op == "bidirectional_scan")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call = scan.make("native")
    times: dict[tuple[int, int, int], float] = {}
    try:
        for choice in [_TABLE, *choices(layer.len)]:
            if not set_choice(*choice):
                raise RuntimeError(f"vim_cuda_tune_scan refuses {choice}")
            # Choices are read when a kernel is launched, so a graph keeps those of its capture.
            times[choice] = 1e6 * time_calls([captured([call], stream)], repeats=7)
    finally:
        set_choice(*_TABLE)
    by_table = times.pop(_TABLE)
    channels, warps, chunk = fastest = min(times, key=times.__getitem__)
    processors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    row = {
        "shape": name,
        "channels_per_multiprocessor": round(2 * layer.batch * layer.dim / processors),
        "channels": channels,
        "warps": warps,
        "chunk": 0 if chunk == _UNCUT else chunk,
        "microseconds": round(times[fastest], 2),
        "table_microseconds": round(by_table, 2),
    }
    best.append(row)
    yield row
    ordered = sorted(times.items(), key=lambda item: item[1])
    yield {"shape": name, "every choice": [f"{c} {us:.2f} us" for c, us in ordered]}


def table(best: list[Row]) -> str:
    """Return the best choices as the rows of kTable in scan_tuning.cu.

    A row holds from its number of channels on, the first one from 0. Where shapes have the same number, the first one
    decides on channels and warps; the rule for the length of chunks leaves short sequences whole.
    """
    of_number: dict[int, list[Row]] = {}
    for row in best:
        of_number.setdefault(row["channels_per_multiprocessor"], []).append(row)
    rows = ["// Measured, in microseconds: the best, the table's before."]
    for number, group in sorted(of_number.items()):
        start = 0 if number == min(of_number) else number
        cut = "true" if any(row["chunk"] for row in group) else "false"
        times = "; ".join(
            f"{row['shape']}, {'chunks of ' + str(row['chunk']) if row['chunk'] else 'not cut'}: "
            f"{row['microseconds']}, {row['table_microseconds']}"
            for row in group
        )
        rows.append(f"{{{start}, {group[0]['channels']}, {group[0]['warps']}, {cut}}},  // {times}")
    return "\n".join(rows)


def variants(section: Section) -> None:
    """Time the kernels of every library that scripts/gpu_pack.sh took along, and the first once more at the end."""
    folder = Path(os.environ.get("VIM_GPU_LIBRARIES", "nowhere"))
    names = sorted(path.name for path in folder.iterdir() if path.name != "base") if folder.is_dir() else []
    if not names and not section.speed:
        section.not_run("variants", "no libraries were taken along (scripts/gpu_pack.sh --variant NAME=FLAGS)")
        return
    for i, name in enumerate(["base", *(names or ["a", "b"]), "base"]):
        section.run(f"{name}, turn {i}", 12.0, partial(_variant, name, folder / name))


def _variant(name: str, folder: Path) -> Iterator[Row]:
    command = [sys.executable, "-m", "scripts.gpu.ops", "--table"]
    environment = {**os.environ, "VIM_PREBUILT": str(folder)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=40, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            yield {"variant": name, **json.loads(line)}
    if done.returncode != 0:
        yield {"variant": name, "ok": False, "exit_code": done.returncode}
