"""Vision Mamba (Vim) for timm: importing this package registers the models, without compiling or touching a GPU.

A command line (`python -m vim.train`) imports this package first. It gets the names below at their first use, so that
`--help` does not wait for PyTorch.
"""

import importlib
from typing import TYPE_CHECKING

from vim.runtime.command import starts_command
from vim.version import __version__

__all__ = ["Block", "Mamba", "RMSNorm", "VisionMamba", "__version__", "compat", "graphed", "ops"]

_PLACES = {
    "Block": "vim.layers",
    "Mamba": "vim.layers",
    "RMSNorm": "vim.layers",
    "VisionMamba": "vim.models",
    "graphed": "vim.runtime.graphed",
}


def __getattr__(name: str) -> object:
    if name in ("compat", "ops"):
        return importlib.import_module(f"vim.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module 'vim' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


if TYPE_CHECKING or not starts_command():
    from vim import compat, ops
    from vim.layers import Block, Mamba, RMSNorm
    from vim.models import VisionMamba
    from vim.runtime.graphed import graphed
