"""The native backend: C++ kernels for the CPU, found or built at first use and attached to the ops of `vim`.

Importing this module loads and builds nothing.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from pathlib import Path

import torch

from vim.ops import _native_build
from vim.ops._backends import Backend, Inapplicable, register_backend

_logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OFF = ("0", "off", "false", "no")


class SwitchedOff(RuntimeError):
    """The user wants no native kernels."""


_lock = threading.Lock()
_library: Path | None = None
_reason: str | None = None  # why there is none, once it was tried


def library_path() -> Path | None:
    """The library that is loaded, or that would be without building; `None` where there is none."""
    return _library or _packaged_library() or _native_build.find_library()


def capability() -> str:
    """Instruction set that the loaded kernels use: "baseline", "avx2" or "avx512"."""
    name = ctypes.CDLL(str(_library)).vim_cpu_capability
    name.restype = ctypes.c_char_p
    return name().decode()


def load() -> str | None:
    """Load the library, building it first if it has to be, once per process.

    Returns:
        `None` when the kernels are attached, otherwise the reason in words.
    """
    global _library, _reason
    with _lock:
        if _library is None and _reason is None:
            try:
                _library = _load()
            except SwitchedOff as error:
                _reason = Inapplicable(error)
            except (_native_build.BuildError, OSError) as error:
                _reason = str(error)
        return _reason


def _load() -> Path:
    if os.environ.get("VIM_NATIVE", "").lower() in _OFF:
        raise SwitchedOff("switched off by VIM_NATIVE")
    packaged = _packaged_library()
    if packaged is not None:
        try:
            return _attach(packaged)
        except OSError as error:  # made for another torch or C library: build one that fits
            _logger.info("cannot load %s: %s", packaged, error)
    found = _native_build.find_library()
    if found is not None:
        try:
            return _attach(found)
        except OSError as error:
            _logger.info("cannot load %s: %s; building it again", found, error)
    _logger.info("building the CPU kernels, once; this takes about ten seconds")
    return _attach(_native_build.build(_logger.debug, force=found is not None))


def _attach(path: Path) -> Path:
    torch.ops.load_library(path)
    if not torch._C._dispatch_has_kernel_for_dispatch_key("vim::bidirectional_scan", "CPU"):
        raise OSError(f"{path} holds no kernels")
    return path


def _packaged_library() -> Path | None:
    """The library of a wheel that was built where torch was installed."""
    path = Path(__file__).parents[1] / "_lib" / _native_build.LIBRARY
    return path if _native_build.is_complete(path) else None


def _why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "meta":
        return Inapplicable("meta tensors have nothing to compute")
    if device.type != "cpu":
        return f"its kernels are for the CPU; on {device.type} the reference runs, which is slow"
    if dtype not in _DTYPES:
        return Inapplicable(f"{str(dtype).removeprefix('torch.')} runs on the reference")
    return load()


register_backend(Backend("native", "", _why_not))
