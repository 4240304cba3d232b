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
CHUNKS = (0, 128, 192, 320, 512, 1024)


def tune(section: Section) -> None:
    """Time the forward scan with every choice of vim_cuda_tune_scan, and write the best as rows of its table."""
    best: list[Row] = []
    for name in SHAPES:
        section.run(name, 3.5, partial(_sweep, name, best))
    if best:
        section.row(paste=table(best))


def choices(length: int) -> list[tuple[int, int, int]]:
    """Return (channels, warps, chunk) that differ for this many tokens; a chunk of 0 leaves it to the table."""
    cut = [chunk for chunk in CHUNKS if chunk < length]
    return [(channels, warps, chunk) for channels in (1, 2) for warps in (1, 2, 4) for chunk in [*cut, _UNCUT]]


# A chunk longer than every sequence here: not cut.
_UNCUT = 2**20


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
        for choice in [(0, 0, 0), *choices(layer.len)]:
            if not set_choice(*choice):
                continue
            # Choices are read when a kernel is launched, so a graph keeps those of its capture.
            times[choice] = 1e6 * time_calls([captured([call], stream)], repeats=7)
    finally:
        set_choice(0, 0, 0)
    channels, warps, chunk = fastest = min(times, key=times.__getitem__)
    processors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    row = {
        "shape": name,
        "channels_per_multiprocessor": round(2 * layer.batch * layer.dim / processors),
        "channels": channels,
        "warps": warps,
        "chunk": 0 if chunk == _UNCUT else chunk,
        "microseconds": round(times[fastest], 2),
        "table_microseconds": round(times[0, 0, 0], 2),
    }
    best.append(row)
    yield row
    ordered = sorted(times.items(), key=lambda item: item[1])
    yield {"shape": name, "every choice": [f"{c} {us:.2f} us" for c, us in ordered]}


def table(best: list[Row]) -> str:
    """Return the best choices as rows for scan_tuning.cu, by the number that it decides by."""
    rows = ["// channels per multiprocessor, channels of a thread, warps; measured, in microseconds: best, table's"]
    for row in sorted(best, key=lambda row: row["channels_per_multiprocessor"]):
        choice = f"{{{row['channels_per_multiprocessor']}, {row['channels'] or 1}, {row['warps'] or 1}, ...}},"
        cut = f"chunks of {row['chunk']}" if row["chunk"] else "not cut"
        rows.append(f"{choice}  // {row['shape']}: {cut}; {row['microseconds']}, {row['table_microseconds']}")
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
