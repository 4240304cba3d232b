"""Whether weights still hold what copies of them were made from.

PyTorch counts the versions of a tensor, but not writes through `.data`, as adapters do when they are merged. A hash
finds these: of a number of each row, in different columns. A change of whole rows is found; one of single numbers may
go unnoticed.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from vim.ops import _native


class Origin:
    """Tensors that copies were made from, as they were then. Keeps none of them alive, nor their memory.

    It is bound to memory and not to tensors: those may be swapped (`torch.utils.swap_tensors`, which allows no weak
    references to them), and the memory goes with what they hold.

    Args:
        tensors: Contiguous, on the CPU, none empty, each within its memory.
        forget: Called when memory of one of them is no more: drops the copies. It must not hold this object.
    """

    def __init__(self, tensors: Sequence[Tensor], forget: Callable[[], object]) -> None:
        storages = [t.untyped_storage() for t in tensors]
        self._references = [weakref.ref(storage, lambda _: forget()) for storage in storages]
        self._announced = _announced(tensors, storages)
        self._matrices = (_Matrix * len(tensors))(*map(_matrix, tensors))
        self._fingerprint = self._take()

    def is_still(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these hold what was copied. Not to be asked once the copies were dropped."""
        # In this order: equal places and sizes of memory mean that there is something to read.
        storages = [*map(Tensor.untyped_storage, tensors)]
        return _announced(tensors, storages) == self._announced and self._take() == self._fingerprint

    def _take(self) -> int:
        return _function()(self._matrices, len(self._matrices))


_told = attrgetter("_version", "shape", "dtype")


def _announced(tensors: Sequence[Tensor], storages: Sequence[torch.UntypedStorage]) -> list[object]:
    """What PyTorch tells of changes: which memory, how much, where in it, versions, sizes and dtypes."""
    sizes = map(torch.UntypedStorage.nbytes, storages)
    return [*map(id, storages), *sizes, *map(Tensor.data_ptr, tensors), *map(_told, tensors)]


class _Matrix(ctypes.Structure):
    """Rows of four-byte words, one after the other."""

    _fields_ = [("data", ctypes.c_void_p), ("rows", ctypes.c_int64), ("columns", ctypes.c_int64)]


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
