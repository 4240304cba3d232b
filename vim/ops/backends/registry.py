"""Backends of the ops: which exist, which run here, and why the others do not.

An op called `name` is defined in the torch.library namespace `vim` once per family of implementations. `vim::name` is
portable: it runs the native kernel if one is attached for the tensor's device, else the reference.
`vim::name_reference` always runs the reference, and `vim::name_triton` Triton's kernels. A backend is a record that
names its family; adding a backend is adding a record.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch

from vim.ops.common.eager import is_transformed

_logger = logging.getLogger(__name__)

WhyNot = Callable[[str, torch.device, torch.dtype], str | None]


class Inapplicable(str):
    """A reason that depends on the input, not on the machine; the fallback is not logged."""


@dataclass(frozen=True)
class Backend:
    """One way to run the ops.

    Attributes:
        name: What users pass as `backend`.
        suffix: Ending of the op's name in `torch.ops.vim` ("" for the portable family).
        why_not: Takes (op, device, dtype); returns `None` if usable for such input, otherwise a sentence for the user.
        by_name_only: The backend runs only if a user names it.
        functions: Plain differentiable functions by op, for a backend that is not a family of registered ops.
    """

    name: str
    suffix: str
    why_not: WhyNot
    by_name_only: bool = False
    functions: Mapping[str, Callable[..., Any]] | None = None


# Each op's reference: plain PyTorch, differentiable without any registration.
_references: dict[str, Callable[..., Any]] = {}
# Preference among these, whatever the order of imports. Backends with other names go in front, the newest first.
_PREFERENCE = ("native", "triton", "reference")
# In order of preference: the first that can run is the default.
_backends: list[Backend] = []
# Functions of the backends that are not families of registered ops, by suffix.
_functions: dict[str, Mapping[str, Callable[..., Any]]] = {}
# Functions that replace every backend while a model is exported, by the form of the recurrence (see `exportable.py`).
_exportable: dict[str, Mapping[str, Callable[..., Any]]] = {}
# Context variables, so that a `with` block in one thread or task changes nothing in another. The first holds the form
# of the recurrence inside `exportable_ops()`, `None` outside.
_exports: ContextVar[str | None] = ContextVar("exports", default=None)
# The backend that `backend=None` means; `None` is the first that can run.
_default: ContextVar[str | None] = ContextVar("default_backend", default=None)
# Types of devices whose portable ops have kernels attached that cannot run.
_pinned: set[str] = set()


def register_reference(op: str, reference: Callable[..., Any]) -> None:
    """Register `op` with the implementation that needs nothing but PyTorch."""
    _references[op] = reference


def register_exportable(recurrence: str, functions: Mapping[str, Callable[..., Any]]) -> None:
    """Register plain functions, one for each op, that replace every backend in exports with this recurrence."""
    _exportable[recurrence] = functions


def register_backend(backend: Backend) -> None:
    """Add a backend at its place in `_PREFERENCE`: in front if it has none there, last if it runs by name only."""
    _backends.insert(0, backend)
    _backends.sort(key=_rank)
    if backend.functions is not None:
        _functions[backend.suffix] = backend.functions
    _choose.cache_clear()


def _rank(backend: Backend) -> int:
    if backend.by_name_only:
        return len(_PREFERENCE)
    return _PREFERENCE.index(backend.name) if backend.name in _PREFERENCE else -1


def pin_to_reference(device_type: str) -> None:
    """Make the reference backend bypass kernels that are attached to the portable ops for this type of device."""
    _pinned.add(device_type)
    _choose.cache_clear()


@contextlib.contextmanager
def isolated_registry(names: Collection[str] | None = None) -> Iterator[None]:
    """Undo at the end of a `with` block what it registers and pins, for all threads; inside, every choice is made anew.

    Args:
        names: The backends that the block begins with; `None` is all of them.
    """
    backends, functions, pinned = list(_backends), dict(_functions), set(_pinned)
    _replace([b for b in backends if names is None or b.name in names], functions, set())
    try:
        yield
    finally:
        _replace(backends, functions, pinned)


def _replace(backends: list[Backend], functions: dict[str, Mapping[str, Callable[..., Any]]], pinned: set[str]) -> None:
    _backends[:] = backends
    _functions.clear()
    _functions.update(functions)
    _pinned.clear()
    _pinned.update(pinned)
    _choose.cache_clear()
    _warn_once.cache_clear()


def available_backends(
    op: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[str, ...]:
    """Return the names of the backends that can run `op` on such tensors, the preferred one first.

    Raises:
        ValueError: `op` is unknown; the message lists the known ones.
    """
    _check_op(op)
    device = torch.device(device)
    return tuple(b.name for b in _backends if b.why_not(op, device, dtype) is None)


def unavailable_backends(
    op: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, str]:
    """Return the backends that cannot run `op` on such tensors, each with the reason in words.

    Raises:
        ValueError: `op` is unknown; the message lists the known ones.
    """
    _check_op(op)
    device = torch.device(device)
    reasons = {b.name: b.why_not(op, device, dtype) for b in _backends}
    return {name: reason for name, reason in reasons.items() if reason is not None}


@contextlib.contextmanager
def default_backend(name: str | None) -> Iterator[None]:
    """Set the backend of ops that name none, inside a `with` block and for this thread or task only.

    Args:
        name: Name of a backend, or `None` for the fastest that applies.

    Raises:
        ValueError: No backend has that name.
    """
    if name is not None:
        _find(name)
    with _set(_default, name):
        yield


@contextlib.contextmanager
def exportable_ops(recurrence: Literal["scan", "operator"] = "scan") -> Iterator[None]:
    """Replace every op by operators that exporters know, inside a `with` block around an export, in this thread.

    `torch.onnx.export` does not need this block.

    Args:
        recurrence: "scan" is torch's scan. "operator" is `vim::recurrence`, for an exporter that translates it.

    Raises:
        ValueError: `recurrence` is neither.
    """
    if recurrence not in _exportable:
        raise ValueError(f"recurrence must be one of {sorted(_exportable)}, got {recurrence!r}")
    with _set(_exports, recurrence):
        yield


def _is_exported() -> bool:
    # Ask torch.onnx only while a graph is recorded: its answer takes two imports.
    records = torch.compiler.is_exporting() or torch.jit.is_tracing()
    return _exports.get() is not None or (records and _is_in_onnx_export())


@torch.compiler.assume_constant_result
def _is_in_onnx_export() -> bool:
    """Return True inside `torch.onnx.export`; traced as a constant, because in a graph torch answers False."""
    return torch.onnx.is_in_onnx_export()


@contextlib.contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def resolve_backend(op: str, backend: str | None, tensor: torch.Tensor) -> Callable[..., Any]:
    """Return the torch op that runs `op` on tensors like `tensor`.

    Args:
        op: Name of the op.
        backend: Name of a backend, or `None` for the fastest that applies.
        tensor: Any tensor of the device and dtype.

    Raises:
        ValueError: No backend has that name.
        RuntimeError: The named backend cannot run here; the message says why.
    """
    if _is_exported():
        return _exportable[_exports.get() or "scan"][op]
    if not torch.compiler.is_compiling() and is_transformed():
        return _references[op]
    suffix = _suffix(op, backend or _default.get(), tensor.device.type, tensor.dtype)
    return _functions[suffix][op] if suffix in _functions else getattr(torch.ops.vim, op + suffix).default


def runs_by_default(op: str, backend: str, tensor: torch.Tensor) -> bool:
    """Return True if `op` runs on this backend, for tensors like `tensor`, where none is named."""
    if _is_exported() or _default.get() not in (None, backend):
        return False
    return _choose(op, None, tensor.device.type, tensor.dtype).name == backend


@torch.compiler.assume_constant_result
def _suffix(op: str, backend: str | None, device_type: str, dtype: torch.dtype) -> str:
    record = _choose(op, backend, device_type, dtype)
    # The portable op runs the reference here, and a graph saved with it runs kernels on machines that have them.
    is_portable = backend is None and record.name == "reference" and device_type not in _pinned
    return "" if is_portable else record.suffix


# Every call of an op asks. Libraries load once per process, so only registering or pinning a backend, which clears the
# cache, changes an answer.
@functools.cache
def _choose(op: str, backend: str | None, device_type: str, dtype: torch.dtype) -> Backend:
    device = torch.device(device_type)
    if backend is not None:
        record = _find(backend)
        reason = record.why_not(op, device, dtype)
        if reason is not None:
            raise RuntimeError(f"backend {backend!r} cannot run {op} on {device_type} {dtype}: {reason}")
        return record
    for record in _backends:
        if record.by_name_only:
            continue
        reason = record.why_not(op, device, dtype)
        if reason is None:
            return record
        if not isinstance(reason, Inapplicable):
            _warn_once(record.name, device_type, reason)
    raise AssertionError("the reference backend runs everywhere")


def _find(name: str) -> Backend:
    record = {b.name: b for b in _backends}.get(name)
    if record is None:
        names = sorted(b.name for b in _backends)
        raise ValueError(f"backend must be one of {names} or None, got {name!r}")
    return record


@functools.cache  # a memory of what was logged
def _warn_once(name: str, device_type: str, reason: str) -> None:
    _logger.warning("backend %r is not used on %s: %s", name, device_type, reason)


def _check_op(op: str) -> None:
    if op not in _references:
        raise ValueError(f"op must be one of {sorted(_references)}, got {op!r}")


register_backend(Backend("reference", "_reference", lambda op, device, dtype: None))
