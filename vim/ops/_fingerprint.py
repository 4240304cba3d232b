"""A hash of weights that finds a change nobody announced: a number of each row, in different columns.

PyTorch counts the versions of a tensor, but not writes through `.data`, as adapters do when they are merged. A change
of whole rows is found; one of single numbers may go unnoticed.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor

from vim.ops import _native


class _Matrix(ctypes.Structure):
    """Rows of four-byte words, one after the other."""

    _fields_ = [("data", ctypes.c_void_p), ("rows", ctypes.c_int64), ("columns", ctypes.c_int64)]


_told = attrgetter("_version", "shape", "dtype")


def announced(tensors: Sequence[Tensor]) -> list[object]:
    """What PyTorch tells of changes: places in memory, versions, sizes and dtypes."""
    return [*map(Tensor.data_ptr, tensors), *map(_told, tensors)]


class Fingerprint:
    """What there is to hash of these tensors, as long as they stay where they are in memory.

    Args:
        tensors: Contiguous, on the CPU, none empty.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._count = len(tensors)
        self._matrices = (_Matrix * self._count)(*(_matrix(t) for t in tensors))

    def take(self) -> int:
        """The hash of what the tensors hold now."""
        return _function()(self._matrices, self._count)


def _matrix(t: Tensor) -> _Matrix:
    row_bytes = t.numel() // t.shape[0] * t.element_size()
    # A vector, or rows of half a word: every word counts.
    rows, words = (t.shape[0], row_bytes // 4) if t.dim() > 1 and row_bytes % 4 == 0 else (t.nbytes // 4, 1)
    return _Matrix(t.data_ptr(), rows, words)


@functools.cache
def _function() -> Any:
    function = ctypes.CDLL(str(_native.library_path())).vim_fingerprint
    function.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    function.restype = ctypes.c_uint64
    return function
