"""Report the machine and the backends of each op: `python -m vim.doctor`."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
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


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report and return 0, also if it reports that something is missing.

    Args:
        argv: The arguments, without the name of the program; `None` is `sys.argv`.
    """
    argparse.ArgumentParser(
        prog="python -m vim.doctor",
        description="Report the versions, the processor, the native kernels, and the backends of each op.",
    ).parse_args(argv)
    for title, lines in (
        ("versions", _versions()),
        ("processor", _processor()),
        ("native kernels for the CPU", _library()),
        ("native kernels for NVIDIA's GPUs", _cuda_library()),
        ("backends, the preferred one first", _backends()),
        ("imports that vim.compat serves", _stand_ins()),
    ):
        print(title)
        for line in lines:
            print(f"  {line}")
    return 0


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
                dtypes = ", ".join(dtype for dtype, found in by_dtype.items() if found == names)
                yield f"{device} {op} ({dtypes}): {', '.join(names)}"
        # A reason seldom depends on the op, so each is printed once.
        for dtype in _DTYPES:
            reasons = {line for op in OPS for line in unavailable_backends(op, device, dtype).items()}
            for name, reason in sorted(reasons):
                yield f"{device} {str(dtype).removeprefix('torch.')}: not {name}: {reason}"


def _stand_ins() -> Iterator[str]:
    for package in compat.PACKAGES:
        yield f"{package}: {compat.state_of(package)}"


if __name__ == "__main__":
    from vim.runtime.terminal import end_with_reader

    end_with_reader()
    sys.exit(main())
