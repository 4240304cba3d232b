"""Triton's interpreter on the CPU: what makes it fast enough for tests, in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import dataclasses
import importlib
import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The others differ from these outside of the kernels.
MIXERS = ["none", "v1", "v2_L1", "v2_L3", "v2_dconv3_expand1_dstate8_dtrank5", "v2_div"]

if INTERPRETED:
    from triton.runtime import interpreter

    _patched: set[str] = set()

    def _call(self, *args, **kwargs):
        # A launch makes the language run on the CPU as kernels see it, and every call of a device function does so
        # again, which takes longer than most functions. It is needed for Triton's own, and once.
        if (module := self.fn.__module__).startswith("triton.") and module not in _patched:
            interpreter._patch_lang(self.fn)
            _patched.add(module)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = _call
    # Looks for int32 overflow, which sizes like these cannot have.
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )


def set_lanes(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Set how many channels a block of a scan has."""
    for op in ("selective_scan", "bidirectional_scan"):
        monkeypatch.setattr(importlib.import_module(f"vim.ops.{op}.triton"), "lanes", lambda device: count)
