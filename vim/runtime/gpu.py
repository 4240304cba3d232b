"""Facts about the GPU, its speed at the moment, and the timing of work on it."""

from __future__ import annotations

import shutil
import statistics
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import torch


def describe_gpu() -> dict[str, Any]:
    """Return the name, size and versions of the current GPU, as a record that JSON takes."""
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": device.name,
        "architecture": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory_gib": round(device.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "driver": _ask_driver("driver_version"),
        "clock_limit_mhz": _ask_driver("clocks.max.sm"),
        "power_limit_w": _ask_driver("power.limit"),
    }


def probe_gpu() -> dict[str, Any]:
    """Measure a copy (bytes read and written) and a bfloat16 product, with the clock and the power under this load."""
    source = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    matrix = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    copy_seconds = time_calls([lambda: target.copy_(source)], repeats=20)
    product_seconds = time_calls([lambda: matrix @ matrix], repeats=20)
    return {
        "copy_gb_per_s": round(2 * source.numel() / copy_seconds / 1e9),
        "bf16_tflops": round(2 * 8192**3 / product_seconds / 1e12),
        "clock_mhz": _ask_driver("clocks.sm"),
        "power_w": _ask_driver("power.draw"),
        "temperature_c": _ask_driver("temperature.gpu"),
    }


def time_calls(calls: Sequence[Callable[[], object]], repeats: int = 5, warm: bool = True) -> float:
    """Return the seconds of a call on the GPU: the median of `repeats` passes over all calls.

    The calls of a pass run back to back, so launches overlap with kernels as in real use.

    Args:
        calls: The calls.
        repeats: Passes that count.
        warm: Add a pass before them that does not count.
    """
    times = []
    for count in range(repeats + warm):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        if count >= warm:
            times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def captured(calls: Sequence[Callable[[], object]], stream: torch.cuda.Stream) -> Callable[[], None]:
    """Capture all calls as one CUDA graph, after each has run once, and return the function that replays it.

    Args:
        calls: The calls. The forward pass of a backward pass among them must have run on `stream`.
        stream: The stream to run and capture on; not the default stream.
    """
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph.replay


def _ask_driver(field: str) -> float | str | None:
    """Return a field of nvidia-smi, as a number if it is one; `None` without nvidia-smi or an answer."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, f"--query-gpu={field}", "--format=csv,noheader,nounits", f"--id={_visible_index()}"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    answer = done.stdout.strip()
    if done.returncode != 0 or not answer:
        return None
    try:
        return float(answer)
    except ValueError:
        return answer


def _visible_index() -> str:
    """Return the identifier of the current device for nvidia-smi; CUDA_VISIBLE_DEVICES may have renumbered devices."""
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
