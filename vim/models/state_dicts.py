"""Find the state dict of a Vision Mamba in the checkpoint of any training loop, by the names of its tensors."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import Tensor

_logger = logging.getLogger(__name__)

Weights = Literal["raw", "ema"]
# Entries that hold the state dict: of the original's (and our) training loop, then of timm's.
_ENTRIES = {"raw": ("model", "state_dict"), "ema": ("model_ema", "state_dict_ema")}
# Depth to which nested dicts are searched for a state dict.
_MAX_DEPTH = 3
# Names that only our models have; the group is the prefix in a larger model.
_OWN = re.compile(r"((?:.+\.)?)layers\.0\.mixer\.")
# Every Vision Mamba has it; Mamba language models do not.
_FIRST_CONV = "patch_embed.proj.weight"
# Parts of names that compiling, sharding and checkpointing insert.
_WRAPPERS = re.compile(r"(^|\.)((_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
# Counters that other programs add: torch.optim.swa_utils.AveragedModel and thop.
_COUNTERS = re.compile(r"n_averaged$|(.*\.)?total_(ops|params)$")
# Names of tensors that identify other models, in the order of the search.
_FOREIGN_NAMES = {
    r".*\.(A_logs|Ds|x_proj_weight|dt_projs_weight|dt_projs_bias)$": "VMamba's family (MzeroMiko/VMamba)",
    r"(.*\.)?layers\.\d+\.blocks\.\d+\.(op|ln_1|self_attention)\.": "VMamba's family (MzeroMiko/VMamba)",
    r"(.*\.)?(forward_conv1d|backward_conv1d)\.": "kyegomez/VisionMamba's model",
    r"to_patch_embedding\.": "vit-pytorch's kind (kyegomez/VisionMamba's is one)",
    r"levels\.\d+\.": "MambaVision's hierarchical model (NVlabs/MambaVision)",
    r"backbone\.(embedding|layers\.\d+\.mixer)\b": "a Mamba language model",
    r"temporal_pos_embedding$": "VideoMamba's model for video",
    r"blocks\.\d+\.attn\.": "a vision transformer",
}


def select_weights(checkpoint: Mapping[str, Any], weights: Weights = "raw") -> dict[str, Tensor]:
    """Return the state dict in a checkpoint, under the names of our modules.

    The state dict may be in an entry of any name, and its names may have the prefix of a wrapper or a larger model.
    The log then says which entry or prefix was chosen.

    Args:
        checkpoint: Checkpoint of a training loop, or a state dict.
        weights: "raw" (the trained weights) or "ema" (their moving average). A plain state dict is "raw".

    Raises:
        ValueError: The checkpoint lacks these weights, holds several models, or is of another model; the message names
            it.
    """
    if weights not in _ENTRIES:
        raise ValueError(f"weights must be 'raw' or 'ema', got {weights!r}")
    state_dict = _bare_names(_entry(checkpoint, weights))
    if not state_dict:
        raise ValueError("the checkpoint has no tensors")
    state_dict = _without_prefix(state_dict)
    odd = next((name for name, value in state_dict.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        kind = type(state_dict[odd]).__name__
        raise ValueError(f"the checkpoint is not a state dict: {odd!r} must be a tensor, got {kind}")
    _refuse_foreign(state_dict)
    return state_dict


def under_own_names(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `state_dict` itself if it has our names, or else the state dict that `select_weights` finds in it.

    Raises:
        ValueError: It holds several models.
    """
    found = any(True for _ in _state_dicts(state_dict))
    if found and (not _has_own_names(state_dict) or any(_COUNTERS.match(str(name)) for name in state_dict)):
        return select_weights(state_dict)
    return state_dict


def _entry(checkpoint: Mapping[str, Any], weights: Weights) -> Mapping[str, Any]:
    """Return the entry with these weights, or the checkpoint itself."""
    found = dict(_state_dicts(checkpoint))
    known = {n for names in _ENTRIES.values() for n in names if isinstance(checkpoint.get(n), Mapping)}
    if known and (not found or known & {place[0] for place in found if place}):
        nested = [kind for kind, names in _ENTRIES.items() if known & {*names}]
        if weights not in nested:
            raise ValueError(f"the checkpoint has no {weights!r} weights, but {' and '.join(map(repr, nested))}")
        return next(checkpoint[n] for n in _ENTRIES[weights] if n in known)
    if weights == "ema":
        raise ValueError("the checkpoint has no 'ema' weights: it is a plain state dict")
    if not found or () in found:
        return checkpoint
    names = [".".join(place) for place in found]
    if len(names) > 1:
        raise ValueError(f"the checkpoint holds several state dicts ({', '.join(names)}); {_SAVE_ONE}")
    _logger.info("the weights are the checkpoint's %r", names[0])
    return next(iter(found.values()))


_SAVE_ONE = "save the one to load separately: torch.save(state_dict, FILE)"


def _state_dicts(contents: Mapping[Any, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the outermost dicts in a checkpoint that have our names, each with its path of keys."""
    if any(isinstance(value, Tensor) and _OWN.match(_bare(str(name))) for name, value in contents.items()):
        yield place, contents
    elif len(place) < _MAX_DEPTH:
        for name, value in contents.items():
            if isinstance(value, Mapping):
                yield from _state_dicts(value, (*place, str(name)))


def _has_own_names(state_dict: Mapping[Any, Any]) -> bool:
    return any(str(name).startswith("layers.0.mixer.") for name in state_dict)


def _bare(name: str) -> str:
    return re.sub(r"^(module\.)+", "", _WRAPPERS.sub(r"\1", name))


def _bare_names(state_dict: Mapping[Any, Any]) -> dict[str, Any]:
    bare = {_bare(str(name)): value for name, value in state_dict.items()}
    return {name: value for name, value in bare.items() if not _COUNTERS.match(name)}


def _without_prefix(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors of our model in a larger one, without their prefix."""
    prefixes = sorted({match[1] for name in state_dict if (match := _OWN.match(name))})
    prefixes = [prefix for prefix in prefixes if prefix + _FIRST_CONV in state_dict]
    if len(prefixes) > 1:
        names = ", ".join(f"{prefix}*" for prefix in prefixes)
        raise ValueError(f"the checkpoint holds several models ({names}); {_SAVE_ONE}")
    if not prefixes or not prefixes[0]:
        return state_dict
    prefix = prefixes[0]
    taken = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    others = [name for name in state_dict if not name.startswith(prefix)]
    if others:
        _logger.warning("the weights are the checkpoint's %s*; left out: %s", prefix, _shortened(others))
    else:
        _logger.info("the weights are the checkpoint's %s*", prefix)
    return taken


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _refuse_foreign(state_dict: dict[str, Tensor]) -> None:
    for pattern, whose in _FOREIGN_NAMES.items():
        found = next((name for name in state_dict if re.match(pattern, name)), None)
        if found is not None:
            raise ValueError(f"the checkpoint is of {whose}, not of Vision Mamba: it has {found!r}")
    proj = state_dict.get(_FIRST_CONV)
    if proj is not None and proj.dim() != 4:
        raise ValueError(f"{_FIRST_CONV} must have 4 axes, got {tuple(proj.shape)}: not a model for images")
