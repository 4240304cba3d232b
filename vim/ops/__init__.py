"""The ops of Vision Mamba, in a folder each: `interface.py` has the function, `reference.py` the specification."""

from vim.ops.add_rms_norm.interface import add_rms_norm
from vim.ops.backends import exportable as exportable
from vim.ops.backends import mamba_ssm as mamba_ssm
from vim.ops.backends import native as native
from vim.ops.backends import triton as triton
from vim.ops.backends.registry import available_backends, default_backend, exportable_ops, unavailable_backends
from vim.ops.bidirectional_block.interface import BlockWeights, bidirectional_block
from vim.ops.bidirectional_conv1d.interface import bidirectional_conv1d
from vim.ops.bidirectional_mixer import InnerWeights, bidirectional_mixer
from vim.ops.bidirectional_scan.interface import ScanOperands, bidirectional_scan
from vim.ops.causal_conv1d.interface import causal_conv1d
from vim.ops.causal_conv1d.update import causal_conv1d_update
from vim.ops.embed_patches.interface import embed_patches
from vim.ops.selective_scan.interface import selective_scan
from vim.ops.selective_scan.update import selective_state_update

__all__ = [
    "BlockWeights",
    "InnerWeights",
    "ScanOperands",
    "add_rms_norm",
    "available_backends",
    "bidirectional_block",
    "bidirectional_conv1d",
    "bidirectional_mixer",
    "bidirectional_scan",
    "causal_conv1d",
    "causal_conv1d_update",
    "default_backend",
    "embed_patches",
    "exportable_ops",
    "selective_scan",
    "selective_state_update",
    "unavailable_backends",
]
