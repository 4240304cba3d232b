"""Names that are imported next to Mamba-1's, and that this library has nothing for.

Importing them works, because a module of a Mamba-1 model may import them all; using them raises. The Mamba-2 kernels
(`mamba_ssm.ops.triton.ssd_combined` and its neighbours) are not here: their import fails, as without the package, so
that models with a fallback of their own take it.
"""

from __future__ import annotations

from typing import Any, NoReturn

_MAMBA_2 = "Mamba-1 only: transformers' Mamba2Model runs Mamba-2 without mamba-ssm"
_LANGUAGE = "transformers' MambaForCausalLM is that model, and takes the kernels of vim.compat"
_LAYERS = "vim.compat has Mamba's mixer, norms and blocks only: write this layer with torch.nn"
_UTILITIES = "transformers generates text and loads weights from the hub"

REFUSED = {
    "Mamba2": _MAMBA_2,
    "Mamba2Simple": _MAMBA_2,
    "Mamba3": "vim.compat stands in for Mamba-1 only",
    "MambaLMHeadModel": _LANGUAGE,
    "MixerModel": _LANGUAGE,
    "MambaConfig": _LANGUAGE,
    "create_block": _LANGUAGE,
    "MHA": _LAYERS,
    "GatedMLP": _LAYERS,
    "GenerationMixin": _UTILITIES,
    "InferenceParams": _UTILITIES,
    "decode": _UTILITIES,
    "load_config_hf": _UTILITIES,
    "load_state_dict_hf": _UTILITIES,
}


def refused(name: str) -> type:
    """Return a class with this name that can be imported and subclassed; making an instance raises RuntimeError."""

    def refuse(self: object, *arguments: Any, **named: Any) -> NoReturn:
        raise RuntimeError(f"vim.compat stands in for mamba-ssm without {name}: {REFUSED[name]}")

    return type(name, (), {"__init__": refuse, "__doc__": f"Refusal of mamba-ssm's `{name}`."})
