"""What `python -m vim.doctor` reports: the machine, the native kernels, and the backends of each op."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from vim import compat
from vim.ops import available_backends, unavailable_backends
from vim.ops.backends import native
from vim.ops.build import compilation, cuda_recipe
from vim.ops.build.private_folders import private_folder
from vim.runtime.machine import package_versions, processor_features, processor_name
from vim.version import __version__

OPS = (
    "add_rms_norm",
    "bidirectional_block",
    "bidirectional_conv1d",
    "bidirectional_scan",
    "causal_conv1d",
    "embed_patches",
    "segmented_conv1d",
    "segmented_scan",
    "selective_scan",
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The instruction sets that the native kernels use, in the words of /proc/cpuinfo.
_CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_bf16", "asimd")


def describe_installation() -> Iterator[tuple[str, Iterator[str]]]:
    """Yield the sections of the report: title and lines."""
    yield "versions", _versions()
    yield "processor", _processor()
    yield "native kernels for the CPU", _library()
    yield "native kernels for NVIDIA's GPUs", _cuda_library()
    yield "backends, the preferred one first", _backends()
    yield "imports that vim.compat serves", _stand_ins()


def _versions() -> Iterator[str]:
    yield f"vimamba {__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    for name, version in package_versions().items():
        yield f"{name}: not installed" if version is None else f"{name} {version}"


def _processor() -> Iterator[str]:
    found = " ".join(processor_features(_CPU_FEATURES)) or "no vector extensions known"
    yield f"{processor_name()}, {os.cpu_count()} cores, {platform.machine()}: {found}"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            yield f"cuda:{i} {torch.cuda.get_device_name(i)}, architecture {major}.{minor}"
    else:
        yield "no GPU that torch can use"


def _library() -> Iterator[str]:
    compiler = compilation.find_compiler()
    yield f"compiler: {_compiler_version(compiler) if compiler else 'none'}"
    yield f"sources: {compilation.find_sources() or 'not installed'}"
    for folder in compilation.cache_folders():
        yield f"cache: {folder} ({_state_of(folder)})"
    reason = native.load()
    if reason is None:
        yield f"library: {native.cpu.path}, using {native.capability()}"
    else:
        yield f"not in use: {reason}"


def _state_of(folder: Path) -> str:
    try:
        private_folder(folder)
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return f"not used: {error}"
    return "exists"


def _cuda_library() -> Iterator[str]:
    nvcc = cuda_recipe.find_nvcc()
    yield f"compiler: {_compiler_version([str(nvcc)]) if nvcc else 'none'}"
    if torch.version.cuda is None:
        yield "not in use: this PyTorch was built without CUDA"
    elif torch.cuda.is_available():
        reason = native.cuda.load()
        yield f"library: {native.cuda.path}" if reason is None else f"not in use: {reason}"
    else:
        found = cuda_recipe.find_library(cuda_recipe.DEFAULT_ARCHITECTURES)
        yield f"not in use: torch finds no GPU ({f'{found} is built' if found else 'none is built'})"


def _compiler_version(compiler: list[str]) -> str:
    try:
        output = subprocess.run(
            [*compiler, "--version"], capture_output=True, text=True, timeout=10, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{compiler[0]} does not run: {error}"
    # nvcc names its release in the line before the last.
    lines = [line for line in output.splitlines() if "release" in line] or output.splitlines()
    return f"{compiler[0]}: {lines[0] if lines else 'says no version'}"


def _backends() -> Iterator[str]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        for op in OPS:
            by_dtype = {str(t).removeprefix("torch."): available_backends(op, device, t) for t in _DTYPES}
            for names in dict.fromkeys(by_dtype.values()):
                served = ", ".join(dtype for dtype, found in by_dtype.items() if found == names)
                yield f"{device} {op} ({served}): {', '.join(names)}"
        reasons: dict[tuple[str, str], list[str]] = {}
        for dtype in _DTYPES:
            for line in {line for op in OPS for line in unavailable_backends(op, device, dtype).items()}:
                reasons.setdefault(line, []).append(str(dtype).removeprefix("torch."))
        # A reason seldom depends on the op or the dtype, so each is printed once.
        for (name, reason), dtypes in sorted(reasons.items()):
            yield f"{device} {', '.join(dtypes)}: not {name}: {reason}"


def _stand_ins() -> Iterator[str]:
    for package in compat.PACKAGES:
        yield f"{package}: {compat.state_of(package)}"
