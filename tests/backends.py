"""What tests ask of the registry of backends beyond its public functions."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import pytest
import torch

from vim.ops.backends import registry
from vim.ops.backends.registry import Backend


def forget_choices() -> None:
    """Have the registry choose again, and warn again."""
    registry._choose.cache_clear()
    registry._warn_once.cache_clear()


def chosen_suffix(op: str, backend: str | None, device: str, dtype: torch.dtype = torch.float32) -> str:
    """Return the ending of the op's name that runs: "" is the portable family."""
    return registry._suffix(op, backend, device, dtype)


def registered() -> list[Backend]:
    """Return the backends in order of preference."""
    return registry._backends


def replace_backends(monkeypatch: pytest.MonkeyPatch, backends: Iterable[Backend]) -> None:
    """Have the registry know these backends until the end of the test."""
    # Choices are remembered in functions of their own, which are as new before the test and as old after it.
    monkeypatch.setattr(registry, "_backends", list(backends))
    for name in ("_choose", "_warn_once"):
        monkeypatch.setattr(registry, name, functools.cache(getattr(registry, name).__wrapped__))


def keep_backends(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Have the registry know the backends of these names alone."""
    replace_backends(monkeypatch, [b for b in registered() if b.name in names])
