"""Checks of constructor arguments: each error names the argument and the value."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Real

import torch


def check_kind(name: str, value: object, kinds: Collection[object], where: str = "") -> None:
    """Raise unless `value` is one of `kinds`."""
    if value not in kinds:
        known = f"from {kinds[0]} to {kinds[-1]}" if isinstance(kinds, range) else f"one of {list(kinds)}"
        raise ValueError(f"{name} must be {known}{where}, got {value!r}")


def check_rates(**rates: object) -> None:
    """Raise unless all values are probabilities."""
    for name, rate in rates.items():
        if not isinstance(rate, Real) or not 0 <= float(rate) <= 1:
            raise ValueError(f"{name} must be a number between 0 and 1, got {rate!r}")


def check_counts(least: int, **counts: object) -> None:
    """Raise unless all values are integers >= `least`."""
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {count!r}")


def check_numbers(least: float, **values: object) -> None:
    """Raise unless all values are numbers >= `least`."""
    for name, value in values.items():
        if not isinstance(value, Real) or not float(value) >= least:
            raise ValueError(f"{name} must be a number >= {least}, got {value!r}")


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise unless parameters can have the dtype; `None` is torch's default."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating one of torch or None, got {dtype!r}")
