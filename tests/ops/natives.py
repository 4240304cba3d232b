"""The native kernels that this machine's compiler makes, or the reason why there are none."""

from __future__ import annotations

import pytest

from vim.ops.backends import native
from vim.ops.backends.registry import Inapplicable
from vim.ops.build import compilation

REASON = native.load()
if REASON is not None and not isinstance(REASON, Inapplicable) and compilation.find_compiler() is not None:
    raise RuntimeError(f"there is a compiler, but there are no native kernels: {REASON}")
needs_native = pytest.mark.skipif(REASON is not None, reason=f"no native kernels: {REASON}")
