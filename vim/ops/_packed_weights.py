"""Weights in oneDNN's own layout, for products in inference: 1.25 times faster with two threads.

A packed weight is used while the tensor it was made from is the same one, at the same place in memory, with the same
sizes, dtype, version and fingerprint (see `_fingerprint` for what that may miss: change weights under `torch.no_grad()`
rather than through `.data`).
"""

from __future__ import annotations

import functools
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from vim.ops import _native
from vim.ops._fingerprint import Fingerprint, announced

_SUPPORT = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
# oneDNN chooses one layout for any number of rows but one; this stands for all of them.
_ROWS = 197


class _Entry(NamedTuple):
    owner: weakref.ref[Tensor]
    memory: torch.UntypedStorage  # kept, so that no other tensor can come to stand at its address
    announced: list[object]
    fingerprint: Fingerprint
    taken: int
    packed: Tensor


_entries: dict[int, _Entry] = {}


@functools.cache
def multiplies_in(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies in this dtype here. For float16 it asks more than most processors have."""
    return dtype not in _SUPPORT or bool(getattr(torch.ops.mkldnn, _SUPPORT[dtype])())


def packed_weight(weight: Tensor) -> Tensor | None:
    """`weight`, (out_features, in_features) on the CPU, in oneDNN's layout; `None` where it cannot be.

    In float32 where oneDNN does not multiply in the dtype of `weight`.
    """
    if not weight.is_contiguous():
        return None
    entry = _entries.get(id(weight))
    if (
        entry is not None
        and entry.owner() is weight
        and entry.announced == announced([weight])
        and entry.taken == entry.fingerprint.take()
    ):
        return entry.packed
    return _pack(weight)


def _pack(weight: Tensor) -> Tensor | None:
    # A fingerprint looks at four bytes at a time.
    if weight.is_inference() or weight.nbytes < 4 or _native.load() is not None:
        return None
    key = id(weight)
    owner = weakref.ref(weight, lambda ref: _forget(key, ref))
    fingerprint = Fingerprint([weight])
    place = (weight.untyped_storage(), announced([weight]))
    taken = fingerprint.take()
    weight_in_its_dtype = weight.detach() if multiplies_in(weight.dtype) else weight.detach().float()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_in_its_dtype, _ROWS)
    _entries[key] = _Entry(owner, *place, fingerprint, taken, packed)
    return packed


def forget_packed(weight: Tensor) -> None:
    """Give back the memory of what was packed of this weight, which is about to be moved or cast."""
    _entries.pop(id(weight), None)


def _forget(key: int, owner: weakref.ref[Tensor]) -> None:
    entry = _entries.get(key)
    if entry is not None and entry.owner is owner:
        del _entries[key]
