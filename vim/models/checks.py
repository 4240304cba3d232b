"""What users may ask of a model: errors that name the argument and the value."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Real

import torch
from timm.models._features import feature_take_indices
from torch import Tensor


def check_kind(name: str, value: object, kinds: Collection[object], where: str = "") -> None:
    """`value` must be one of `kinds`."""
    if value not in kinds:
        known = f"from {kinds[0]} to {kinds[-1]}" if isinstance(kinds, range) else f"one of {list(kinds)}"
        raise ValueError(f"{name} must be {known}{where}, got {value!r}")


def check_rates(**rates: object) -> None:
    """Probabilities."""
    for name, rate in rates.items():
        if not isinstance(rate, Real) or not 0 <= float(rate) <= 1:
            raise ValueError(f"{name} must be a number between 0 and 1, got {rate!r}")


def check_counts(least: int, **counts: object) -> None:
    """Integers from `least` on."""
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {count!r}")


def check_numbers(least: float, **values: object) -> None:
    """Numbers from `least` on."""
    for name, value in values.items():
        if not isinstance(value, Real) or not float(value) >= least:
            raise ValueError(f"{name} must be a number >= {least}, got {value!r}")


def check_dtype(dtype: torch.dtype | None) -> None:
    """A dtype that parameters can have."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating one of torch or None, got {dtype!r}")


def check_order(name: str, order: Tensor, length: int) -> None:
    """A permutation of `length` tokens."""
    if order.shape != (length,) or not torch.equal(order.sort().values, torch.arange(length, device=order.device)):
        raise ValueError(f"{name} must be a permutation of {length} tokens, got a tensor of shape {tuple(order.shape)}")


def check_blocks(indices: int | list[int] | None, depth: int) -> tuple[list[int], int]:
    """Which blocks `indices` means, as timm counts: the last n, those in a list, or all; and the last of them."""
    if isinstance(indices, int):
        if not 1 <= indices <= depth:
            raise ValueError(f"indices must be 1 to {depth} last blocks or a list of blocks, got {indices}")
    elif indices is not None:
        listed = list(indices) if isinstance(indices, (list, tuple, range)) else [None]
        if not listed or not all(isinstance(i, int) and -depth <= i < depth for i in listed):
            raise ValueError(f"indices must be a list of blocks, from {-depth} to {depth - 1}, got {indices!r}")
    return feature_take_indices(depth, indices)
