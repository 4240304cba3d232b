"""Tools for measurements: the speed of the machine at this moment, the allocator, and peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vim.runtime.gpu import probe_gpu


def probe_machine(device: str = "cpu") -> dict[str, Any]:
    """Measure the speed of the machine at this moment, as a record that JSON takes.

    On a CPU: the float32 matrix product rate with one thread and with all, in GFLOP/s, and the load average of the last
    minute. Two threads do not always get two cores, and the ratio of the rates shows it. On a GPU see `probe_gpu`.

    Args:
        device: `cpu` or `cuda`.
    """
    if device == "cuda":
        return probe_gpu()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = _product_rate()
        torch.set_num_threads(threads)
        return {
            "gflops_1_thread": round(single, 1),
            f"gflops_{threads}_threads": round(_product_rate(), 1),
            "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else float("nan"),
        }
    finally:
        torch.set_num_threads(threads)


def _product_rate(size: int = 768, rounds: int = 7) -> float:
    a, b = torch.randn(size, size), torch.randn(size, size)
    times = []
    with torch.no_grad():
        for _ in range(rounds):
            start = time.perf_counter()
            F.linear(a, b)
            times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times) / 1e9


def interleave(calls: dict[str, Callable[[], Any]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Time calls in turn, so that a change of the machine's speed meets all of them alike.

    Args:
        calls: Calls by name, each of which has run before.
        rounds: Times that each call runs.
        seconds: No round begins after this time, except for the first two.

    Returns:
        The seconds of each round, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds
    for done in range(rounds):
        if done >= 2 and time.perf_counter() > deadline:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def summarise(times: list[float]) -> dict[str, Any]:
    """Return the number, the median and the least of some seconds, as fields of a row."""
    return {"rounds": len(times), "seconds_median": statistics.median(times), "seconds_min": min(times)}


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory in the process, as the allocators recommended for PyTorch do.

    By default glibc returns large blocks to the system and faults them in again, page by page. That takes up to a third
    of a call's time, and varies between runs.

    Returns:
        True if the allocator took the settings.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(mmap_threshold, 32 * 2**20) and mallopt(trim_threshold, 2**31 - 1))


class PeakMemory(contextlib.AbstractContextManager["PeakMemory"]):
    """A context that measures the peak of the memory that a block takes, in MiB beyond the memory in use before it.

    On a GPU: memory allocated by PyTorch. On Linux: resident memory of the process, after free memory went back to the
    system. Elsewhere the result is `None`.

    Args:
        device: The device of the block.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.mebibytes: float | None = None

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before: float | None = torch.cuda.memory_allocated(self._device) / 2**20
        else:
            self._before = self._reset_resident_peak()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is None:
            return
        if self._device.type == "cuda":
            peak: float | None = torch.cuda.max_memory_allocated(self._device) / 2**20
        else:
            peak = _status_mebibytes("VmHWM")
        self.mebibytes = None if peak is None else round(peak - self._before, 1)

    @staticmethod
    def _reset_resident_peak() -> float | None:
        try:
            with contextlib.suppress(AttributeError):  # only glibc has malloc_trim
                ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return None
        return _status_mebibytes("VmRSS")


def _status_mebibytes(key: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    values = [int(line.split()[1]) / 1024 for line in lines if line.startswith(key)]
    return values[0] if values else None
