"""What a measurement was made on: versions, cores, load, and the rates the machine gave at that moment."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F

from vim.runtime.gpu import describe_gpu, probe_gpu
from vim.version import __version__

_PACKAGES = ("torchvision", "timm", "numpy", "pillow", "safetensors", "triton", "mamba-ssm")


def describe_machine() -> dict[str, Any]:
    """Hardware and versions, as a record that JSON takes."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "vim": __version__,
    }
    if torch.cuda.is_available():
        facts |= describe_gpu()
    return facts


def probe_machine(device: str = "cpu") -> dict[str, Any]:
    """What a GPU gives at this moment (see `probe_gpu`), or a CPU.

    Of a CPU the float32 product rate with one thread and with all, in GFLOP/s, and the load average of the last minute.
    Two threads do not always get two cores: the ratio tells what a table is worth.
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


def keep_freed_memory() -> bool:
    """Keep memory that was freed in the process, as the allocators do that are recommended for PyTorch.

    glibc's gives large blocks back to the system and takes them again, page by page: up to a third of a call's time,
    more in one run than in the next. Returns whether it could be told so.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(mmap_threshold, 32 * 2**20) and mallopt(trim_threshold, 2**31 - 1))


class PeakMemory(contextlib.AbstractContextManager["PeakMemory"]):
    """Largest memory that a piece of code took beyond what was there before, in MiB; `None` where nobody counts it.

    On a GPU what PyTorch allocated; on Linux the process' resident memory, after what was free went back to the system.
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


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    name = named.get("model name", platform.processor() or "unknown")
    return f"{name} (family {named['cpu family']}, model {named['model']})" if "cpu family" in named else name


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return what is needed to tell later how a run was started: command, versions, commit and hardware."""
    return {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": [sys.executable, *sys.argv],
        "folder": os.getcwd(),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name)) is not None}
        | {"vimamba": __version__, "torch": torch.__version__},  # the latter with its build, such as +cu132
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the library's sources, with `+changes` if files differ from it; `None` outside git."""
    sources = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(sources), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != sources:
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
