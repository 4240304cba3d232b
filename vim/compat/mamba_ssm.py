"""The functions and modules of mamba-ssm, on this library's ops and layers.

`layer_norm_fn`, `rms_norm_fn` and `Block` have the arguments of mamba-ssm 2; their counterparts of version 1 end in 1.
"""

from vim.compat.mixer import Block, Block1, Mamba
from vim.compat.norms import RMSNorm, layer_norm_fn, layer_norm_fn_1, rms_norm_fn, rms_norm_fn_1
from vim.compat.scans import (
    bimamba_inner_fn,
    bimamba_inner_ref,
    mamba_inner_fn,
    mamba_inner_fn_no_out_proj,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
    selective_state_update,
    selective_state_update_ref,
)

__all__ = [
    "Block",
    "Block1",
    "Mamba",
    "RMSNorm",
    "bimamba_inner_fn",
    "bimamba_inner_ref",
    "layer_norm_fn",
    "layer_norm_fn_1",
    "mamba_inner_fn",
    "mamba_inner_fn_no_out_proj",
    "mamba_inner_ref",
    "rms_norm_fn",
    "rms_norm_fn_1",
    "selective_scan_fn",
    "selective_scan_ref",
    "selective_state_update",
    "selective_state_update_ref",
]
