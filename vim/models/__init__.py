"""Models; importing this package registers them with timm."""

from vim.models import variants as variants
from vim.models.pyramid import VimPyramid
from vim.models.vision_mamba import VisionMamba

__all__ = ["VimPyramid", "VisionMamba"]
