"""Vision Mamba (Vim) for timm: importing this registers the models; it compiles nothing and touches no GPU."""

from vim import ops
from vim.layers import Block, Mamba, RMSNorm
from vim.models import VisionMamba
from vim.version import __version__

__all__ = ["Block", "Mamba", "RMSNorm", "VisionMamba", "__version__", "ops"]
