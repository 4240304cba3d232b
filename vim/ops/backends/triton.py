"""The Triton backend: finds its kernels, or says why they do not run. Importing `vim` does not import Triton.

Its ops are opaque to torch.compile, as all ops of `vim` are. torch.library.triton_op would show it the launches, but
needs Triton when `vim` is imported, and there is nothing to fuse into a sequential scan.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vim.ops.backends.registry import Backend, Inapplicable, register_backend
from vim.ops.common.registration import by_reference, define_family

_logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GPUS = ("cuda", "xpu")  # torch calls AMD's GPUs cuda, too

# Ops that have no kernels of their own: the model runs their parts.
_WITHOUT_KERNELS = ("bidirectional_block", "embed_patches")
# Ops whose kernels are in the file of another op.
_FILES = {"segmented_conv1d": "causal_conv1d", "segmented_scan": "selective_scan"}


def _implement(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """Return the implementation of `vim::<name>_triton`: Triton's kernel, or the reference where it cannot compute.

    Args:
        name: Name of the op, "<op>" or "<op>_backward"; the kernel is the function of that name in
            `vim.ops.<op>.triton`, or in the file that `_FILES` names.
        reference: The implementation that computes in any dtype.
    """
    op = name.removesuffix("_backward")
    if op in _WITHOUT_KERNELS:
        return by_reference(name, reference)

    def run(*args: Any) -> Any:
        for argument in args:
            if isinstance(argument, Tensor) and argument.dtype not in (*_DTYPES, torch.int32):  # of sequence indices
                _warn_once(name, str(argument.dtype).removeprefix("torch."))
                return by_reference(name, reference)(*args)
        module = importlib.import_module(f"vim.ops.{_FILES.get(op, op)}.triton")
        return getattr(module, name)(*args)

    return run


@functools.cache  # a memory of what was logged
def _warn_once(name: str, dtype: str) -> None:
    _logger.warning("backend 'triton' does not compute %s in %s: the reference runs, which is slow", name, dtype)


def _why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if op in _WITHOUT_KERNELS:
        return Inapplicable(f"it has no kernel for {op}, which runs by its parts")
    if device.type == "meta":
        return Inapplicable("meta tensors have nothing to compute")
    if dtype not in _DTYPES:
        return Inapplicable(f"{str(dtype).removeprefix('torch.')} runs on the reference")
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return Inapplicable("its kernels are for GPUs; TRITON_INTERPRET=1 runs them here, slowly, to test them")
    elif device.type not in _GPUS:
        return Inapplicable(f"Triton does not compile for {device.type}")
    return _why_not_importable()


def _why_not_importable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        importlib.import_module("vim.ops.selective_scan.triton")
    except (ImportError, AttributeError, RuntimeError) as error:  # no driver, or a version without what the kernels use
        return f"triton cannot be imported: {error}"
    return None


define_family("_triton", _implement)
register_backend(Backend("triton", "_triton", _why_not))
