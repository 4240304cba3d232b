"""Contents of the modules that stand in for mamba-ssm and causal-conv1d, by name of the module."""

from __future__ import annotations

from typing import Any

from einops import rearrange, repeat

from vim.compat import causal_conv1d, mixer, norms, scans
from vim.compat.refused import REFUSED, refused

# The newest versions whose signatures the stand-ins accept. The local part says that they are stand-ins.
MAMBA_SSM, CAUSAL_CONV1D = "2.3.0+vim", "1.7.0+vim"


def _named(module: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(module, name) for name in names}


_REFUSED = {name: refused(name) for name in REFUSED}


def _refused(*names: str) -> dict[str, Any]:
    return {name: _REFUSED[name] for name in names}


_SCANS = _named(scans, "selective_scan_fn", "mamba_inner_fn")
_NORM_CLASS = _named(norms, "RMSNorm")
_CONVOLUTIONS = _named(causal_conv1d, "causal_conv1d_fn", "causal_conv1d_update")

CONTENTS: dict[str, dict[str, Any]] = {
    "mamba_ssm": {
        **_SCANS,
        **_named(mixer, "Mamba"),
        **_refused("Mamba2", "Mamba3", "MambaLMHeadModel"),
        "__version__": MAMBA_SSM,
    },
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.mamba_simple": {**_SCANS, **_NORM_CLASS, **_named(mixer, "Mamba"), "Block": mixer.Block1},
    "mamba_ssm.modules.block": _named(mixer, "Block"),
    "mamba_ssm.modules.mamba2": _refused("Mamba2"),
    "mamba_ssm.modules.mamba2_simple": _refused("Mamba2Simple"),
    "mamba_ssm.modules.mamba3": _refused("Mamba3"),
    "mamba_ssm.modules.mha": _refused("MHA"),
    "mamba_ssm.modules.mlp": _refused("GatedMLP"),
    "mamba_ssm.models": {},
    "mamba_ssm.models.config_mamba": _refused("MambaConfig"),
    "mamba_ssm.models.mixer_seq_simple": _refused("MambaConfig", "MambaLMHeadModel", "MixerModel", "create_block"),
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": {
        **_SCANS,
        **_CONVOLUTIONS,
        **_named(scans, "selective_scan_ref", "mamba_inner_ref", "mamba_inner_fn_no_out_proj"),
        **_named(scans, "bimamba_inner_fn", "bimamba_inner_ref"),
        "rearrange": rearrange,
        "repeat": repeat,
    },
    "mamba_ssm.ops.triton": {},
    # The module of version 1, and that of version 2, where arguments stand in another order.
    "mamba_ssm.ops.triton.layernorm": {
        **_NORM_CLASS,
        "layer_norm_fn": norms.layer_norm_fn_1,
        "rms_norm_fn": norms.rms_norm_fn_1,
    },
    "mamba_ssm.ops.triton.layer_norm": {**_NORM_CLASS, **_named(norms, "layer_norm_fn", "rms_norm_fn")},
    "mamba_ssm.ops.triton.selective_state_update": _named(
        scans, "selective_state_update", "selective_state_update_ref"
    ),
    "mamba_ssm.utils": {},
    "mamba_ssm.utils.generation": _refused("GenerationMixin", "InferenceParams", "decode"),
    "mamba_ssm.utils.hf": _refused("load_config_hf", "load_state_dict_hf"),
    "causal_conv1d": {**_CONVOLUTIONS, "__version__": CAUSAL_CONV1D},
    "causal_conv1d.causal_conv1d_interface": {
        **_CONVOLUTIONS,
        **_named(causal_conv1d, "causal_conv1d_ref", "causal_conv1d_update_ref"),
    },
}
