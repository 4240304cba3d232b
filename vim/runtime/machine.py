"""Facts about this machine and the software on it, for the doctor, run folders and benchmarks."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from vim.runtime.gpu import describe_gpu
from vim.version import __version__

_PACKAGES = (
    *("torchvision", "timm", "numpy", "pillow", "safetensors"),
    *("triton", "mamba-ssm", "causal-conv1d"),
)


def describe_machine() -> dict[str, Any]:
    """Return the hardware and the main versions, as a record that JSON takes."""
    facts: dict[str, Any] = {
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": package_versions()["timm"],
        "vim": __version__,
    }
    if torch.cuda.is_available():
        facts |= describe_gpu()
    return facts


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return how and where this process was started: command, versions, commit and hardware.

    Args:
        device: The device that the process computes on.
    """
    versions = {name: version for name, version in package_versions().items() if version is not None}
    return {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": [sys.executable, *sys.argv],
        "folder": os.getcwd(),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions | {"vimamba": __version__, "torch": torch.__version__},  # torch's with its build
        "platform": platform.platform(),
        "cpu": processor_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }


def package_versions() -> dict[str, str | None]:
    """Return the versions of the packages that matter to the library; `None` for one that is not installed."""
    return {name: _version(name) for name in _PACKAGES}


def processor_name() -> str:
    """Return the name of the processor, with its family and model where Linux reports them."""
    fields = _processor_fields()
    name = fields.get("model name") or platform.processor() or platform.machine() or "unknown"
    return f"{name} (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else name


def processor_features(names: Iterable[str]) -> list[str]:
    """Return the features among `names`, in the words of /proc/cpuinfo, that the processor has.

    The list is empty where there is no /proc/cpuinfo.
    """
    fields = _processor_fields()
    found = set(fields.get("flags", fields.get("Features", "")).split())
    return [name for name in names if name in found]


def _processor_fields() -> dict[str, str]:
    """Return the fields of the first processor in /proc/cpuinfo, or an empty dict without this file."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the git commit of the sources, with `+changes` if files differ from it; `None` outside git."""
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
