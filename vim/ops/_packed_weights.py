"""Weights packed for products in inference: for kernels of vim's own in float32, for oneDNN in half precision.

A packed weight is used while the memory it was made from is there and holds the same weight: the same place, sizes,
dtype, version and fingerprint (see `_fingerprint` for what that may miss: change weights under `torch.no_grad()` rather
than through `.data`). It goes when that memory goes.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from vim.ops import _native
from vim.ops._checks import check_memory
from vim.ops._fingerprint import Origin

torch.library.define("vim::pack_weight", "(Tensor weight) -> Tensor")

_SUPPORT = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
# oneDNN chooses one layout for any number of rows but one; this stands for all of them.
_ROWS = 197
_Place = tuple[int, int | torch.SymInt]


class _Entry(NamedTuple):
    origin: Origin
    packed: Tensor


# Several weights may share their memory, and a weight its memory with views of it.
_entries: dict[_Place, _Entry] = {}


@functools.cache
def multiplies_in(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies in this dtype here. For float16 it asks more than most processors have."""
    return dtype not in _SUPPORT or bool(getattr(torch.ops.mkldnn, _SUPPORT[dtype])())


def packed_weight(weight: Tensor) -> Tensor | None:
    """`weight`, (out_features, in_features) on the CPU, packed; `None` where it cannot be.

    In oneDNN's layout (`is_mkldnn`) where it is in a half precision that oneDNN multiplies in, else in float32 for
    `vim::packed_linear`.
    """
    if not weight.is_contiguous():
        return None
    entry = _entries.get(_place(weight))
    if entry is not None and entry.origin.is_still((weight,)):
        return entry.packed
    return _pack(weight)


def _pack(weight: Tensor) -> Tensor | None:
    check_memory("weight", weight)
    # A fingerprint looks at four bytes at a time.
    if weight.is_inference() or weight.nbytes < 4 or _native.load() is not None:
        return None
    place = _place(weight)
    # Taken first: a change while the weight is packed is found at the next call.
    origin = Origin((weight,), functools.partial(_entries.pop, place, None))
    if weight.dtype is torch.float32 or not multiplies_in(weight.dtype):
        packed = torch.ops.vim.pack_weight(weight.detach())
    else:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
    _entries[place] = _Entry(origin, packed)
    return packed


def _place(weight: Tensor) -> _Place:
    """Which memory, and where in it."""
    return id(weight.untyped_storage()), weight.storage_offset()


def forget_packed(weight: Tensor) -> None:
    """Give back the memory of what was packed of this weight, which is about to be moved or cast."""
    if weight.layout is torch.strided and (type(weight) is Parameter or type(weight) is Tensor):
        _entries.pop(_place(weight), None)
