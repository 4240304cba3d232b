"""Layers of the models."""

from vim.layers.block import Block
from vim.layers.mixer import Mamba
from vim.layers.norm import AddResidual, LayerNorm, RMSNorm
from vim.layers.patch_embed import PatchEmbed
from vim.layers.rope import GridRotary

__all__ = ["AddResidual", "Block", "GridRotary", "LayerNorm", "Mamba", "PatchEmbed", "RMSNorm"]
