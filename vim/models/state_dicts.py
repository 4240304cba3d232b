"""The state dict of a model of ours in what a training loop saved, recognised by its contents."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import Tensor

_logger = logging.getLogger(__name__)

Weights = Literal["raw", "ema"]
# Where a checkpoint keeps a state dict: the original's (and our) training loop, then timm's.
_ENTRIES = {"raw": ("model", "state_dict"), "ema": ("model_ema", "state_dict_ema")}
# How deep dicts in dicts are searched for a state dict.
_DEEPEST = 3
# Names that only we have, and what comes before them in a larger model.
_OWN = re.compile(r"((?:.+\.)?)layers\.0\.mixer\.")
# Every model for images has it, no Mamba language model does.
_FIRST_CONV = "patch_embed.proj.weight"
# What compiling, sharding and checkpointing put into names.
_WRAPPERS = re.compile(r"(^|\.)((_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
# Counters that other programs add: torch.optim.swa_utils.AveragedModel and thop.
_COUNTERS = re.compile(r"n_averaged$|(.*\.)?total_(ops|params)$")
# Names of tensors that only one kind of model has, in the order in which they are looked for.
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
    """The state dict in a checkpoint, under the names of our modules.

    It may lie in an entry of any name, and its names may have any prefix, as those of a wrapper or of a larger model
    do. What is taken from such a place is logged.

    Args:
        checkpoint: What a training loop saved, or a state dict.
        weights: "raw" (the trained weights) or "ema" (their moving average). A plain state dict is "raw".

    Raises:
        ValueError: The checkpoint has no such weights or those of several models, or they are another model's; the
            message says whose.
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
        raise ValueError(f"the checkpoint is no state dict: {odd!r} must be a tensor, got {kind}")
    _refuse_foreign(state_dict)
    return state_dict


def under_own_names(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `select_weights` finds where our names lie elsewhere than in `state_dict` itself, otherwise `state_dict`.

    Raises:
        ValueError: There are those of several models.
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


_SAVE_ONE = "save the one that is meant by itself: torch.save(state_dict, FILE)"


def _state_dicts(contents: Mapping[Any, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the dicts in a checkpoint that have names of ours, with where they are; those in a found one are not."""
    if any(isinstance(value, Tensor) and _OWN.match(_bare(str(name))) for name, value in contents.items()):
        yield place, contents
    elif len(place) < _DEEPEST:
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
    """Return what belongs to the one model of ours in a larger one."""
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
