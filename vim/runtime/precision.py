"""The precision that models run in."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from vim.config.schema import Precision

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(device_type: str, precision: Precision) -> AbstractContextManager[Any]:
    """Return the context to run a model in with a precision."""
    dtype = _AUTOCAST.get(precision)
    return torch.autocast(device_type, dtype=dtype, enabled=dtype is not None)


def set_matmul_precision(precision: Precision) -> None:
    """Let float32 matrix products and convolutions on a GPU use TensorFloat-32, or keep them from it."""
    tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
