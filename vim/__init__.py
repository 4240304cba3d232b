"""Vision Mamba (Vim) for timm: importing this registers the models; it compiles nothing and touches no GPU."""

from vim import ops
from vim.layers import Block, Mamba
from vim.models import VisionMamba
from vim.version import __version__

__all__ = ["Block", "Mamba", "VisionMamba", "__version__", "ops"]
