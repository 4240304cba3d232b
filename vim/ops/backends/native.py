"""The native backend: compiled kernels, found or built at first use and attached to the ops of `vim`.

There is one library in C++ for the CPU, and one in CUDA for NVIDIA's GPUs. Importing this module loads and builds
nothing.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from vim.ops.backends.registry import Backend, Inapplicable, pin_to_reference, register_backend
from vim.ops.build import compilation, cuda_recipe

_logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OFF = ("0", "off", "false", "no")
_PROGRESS_INTERVAL = 5.0  # seconds between two lines about a build


class SwitchedOff(RuntimeError):
    """Error for a user who switched native kernels off."""


class NativeLibrary:
    """The library of kernels for the CPU, loaded (and built if necessary) once per process.

    Attributes:
        path: The loaded library, or `None`.
        reason: Why loading failed, or `None` before it was tried.
    """

    dispatch_key = "CPU"
    duration = "10 to 60 seconds"  # of a build

    def __init__(self) -> None:
        self.path: Path | None = None
        self.reason: str | None = None
        self._lock = threading.Lock()

    def load(self) -> str | None:
        """Return `None` when the kernels are attached, otherwise the reason in words."""
        with self._lock:
            if self.path is None and self.reason is None:
                try:
                    self.path = self._load()
                except SwitchedOff as error:
                    self.reason = Inapplicable(error)
                except (compilation.BuildError, OSError) as error:
                    self.reason = str(error)
            return self.reason

    def recipe(self) -> compilation.Recipe:
        """Return the recipe of the library for this machine."""
        return compilation.cpu_recipe()

    def found(self) -> Iterator[Path]:
        """Yield the libraries that exist without building, the preferred one first."""
        recipe = self.recipe()
        yield from compilation.find_libraries(recipe, recipe.library)

    def build(self, why: str | None) -> Path:
        """Build the library, with lines for the user who waits for it, and return its path.

        Args:
            why: Why a library that exists does not do; `None` if there is none.
        """
        recipe = self.recipe()
        if recipe.compilers:
            reason = why or compilation.why_none(recipe)
            _logger.warning("compiling the %s kernels, once, in %s: %s", self.dispatch_key, self.duration, reason)
        return compilation.build(recipe, _progress(), force=why is not None)

    def _load(self) -> Path:
        if os.environ.get("VIM_NATIVE", "").lower() in _OFF:
            raise SwitchedOff("switched off by VIM_NATIVE")
        self.check_settings()
        why = None
        for path in self.found():
            try:
                return self._attach(path)
            except OSError as error:  # made for another torch or C library: build one that fits
                why = f"{path} cannot be loaded: {error}"
        return self._attach(self.build(why))

    def check_settings(self) -> None:
        """Raise BuildError if $VIM_CPU_CAPABILITY is unknown; the library would use the slowest kernels."""
        wanted = os.environ.get("VIM_CPU_CAPABILITY", "")
        if wanted and wanted not in compilation.instruction_sets():
            choices = ", ".join(compilation.instruction_sets())
            raise compilation.BuildError(f"VIM_CPU_CAPABILITY must be one of {choices}, got {wanted!r}")

    def _attach(self, path: Path) -> Path:
        torch.ops.load_library(path)
        if not self.runs("bidirectional_scan"):
            raise OSError(f"{path} holds no kernels")
        return path

    def runs(self, op: str) -> bool:
        """Return True if the loaded library has a kernel for this op."""
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"vim::{op}", self.dispatch_key)


class CUDALibrary(NativeLibrary):
    """The library of kernels for the GPUs that torch sees."""

    dispatch_key = "CUDA"
    duration = "one to three minutes"

    def recipe(self) -> compilation.Recipe:
        """Return the recipe for all these GPUs."""
        return cuda_recipe.recipe(cuda_recipe.visible_architectures())

    def found(self) -> Iterator[Path]:
        """Yield the libraries for all these GPUs that exist."""
        yield from cuda_recipe.serving_libraries(cuda_recipe.visible_architectures())

    def check_settings(self) -> None:
        """Check nothing: the settings are for the CPU."""

    def _attach(self, path: Path) -> Path:
        super()._attach(path)
        problem = cuda_recipe.problem(path)
        if problem is not None:
            # Kernels cannot be detached from ops, so calls go to ops without them.
            pin_to_reference("cuda")
            raise compilation.BuildError(f"{path} cannot run here: {problem}")
        return path


cpu = NativeLibrary()
cuda = CUDALibrary()


def load() -> str | None:
    """Load the CPU's library; return `None`, or in words why there is none."""
    return cpu.load()


def library_path() -> Path | None:
    """Return the CPU's library that is loaded, or would be loaded without building; `None` if there is none."""
    return cpu.path or next(cpu.found(), None)


def capability() -> str:
    """Return the instruction set of the loaded CPU kernels: "baseline", "avx2", "avx512" or "avx512bf16"."""
    name = ctypes.CDLL(str(cpu.path)).vim_cpu_capability
    name.restype = ctypes.c_char_p
    return name().decode()


def _progress() -> compilation.Report:
    """Return a report that logs a line of a build every few seconds."""
    last = time.monotonic()

    def report(line: str) -> None:
        nonlocal last
        due = time.monotonic() - last >= _PROGRESS_INTERVAL
        if due:
            last = time.monotonic()
        _logger.log(logging.WARNING if due else logging.DEBUG, line)

    return report


def _why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "meta":
        return Inapplicable("meta tensors have nothing to compute")
    if device.type == "cuda" and not torch.cuda.is_available():
        return Inapplicable("torch finds no GPU")
    if device.type == "cuda" and torch.version.cuda is None:
        return Inapplicable("its GPU kernels are for NVIDIA's")
    if device.type not in ("cpu", "cuda"):
        return f"its kernels are for the CPU and for NVIDIA's GPUs; on {device.type} the next backend runs"
    if dtype not in _DTYPES:
        return Inapplicable(f"{str(dtype).removeprefix('torch.')} runs on the reference")
    library = cuda if device.type == "cuda" else cpu
    reason = library.load()
    if reason is None and not library.runs(op):
        return Inapplicable(f"it has no kernel for {op} on {device.type}")
    return reason


register_backend(Backend("native", "", _why_not))
