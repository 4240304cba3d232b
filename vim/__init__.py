"""Vision Mamba (Vim) for timm: importing this package registers the models, without compiling or touching a GPU."""

from vim import compat, ops
from vim.layers import Block, Mamba, RMSNorm
from vim.models import VisionMamba
from vim.runtime.graphed import graphed
from vim.version import __version__

__all__ = ["Block", "Mamba", "RMSNorm", "VisionMamba", "__version__", "compat", "graphed", "ops"]
