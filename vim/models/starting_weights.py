"""Start a model from existing weights: a released file, a run folder, or a safetensors file."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.models import adapt_input_conv
from torch import Tensor, nn

from vim.checkpoints.io import FORMAT, CheckpointError, load_checkpoint, load_weights
from vim.config.schema import ModelConfig
from vim.models import VisionMamba
from vim.models.pretrained import checkpoint_filter_fn, read_checkpoint, select_weights

_logger = logging.getLogger(__name__)

_HEAD = ("head.weight", "head.bias")
_FIRST_CONV = "patch_embed.proj.weight"
METADATA_KEY = "vimamba"
"""Metadata key of our safetensors files that holds the settings and the class names of the run."""


def load_starting_weights(model: nn.Module, config: ModelConfig, class_names: Sequence[str] | None = None) -> None:
    """Copy the weights of `model.checkpoint` into a model.

    Tensors that depend on sizes are fitted: the position embedding is resampled, and the patch embedding is adapted to
    the patch size and the channels. If the classes differ, the head keeps its random weights.

    Args:
        model: The model, changed in place.
        config: Its settings.
        class_names: Names of its classes. If the file names its classes too and they differ, its head is not used.

    Raises:
        FileNotFoundError: There is no such file, or the run folder has no checkpoint.
        ValueError: The file is damaged, lacks the requested weights, or is of another architecture; the message names
            the first difference.
    """
    path = Path(str(config.checkpoint)).expanduser()
    if not isinstance(model, VisionMamba):
        raise ValueError(
            f"model.checkpoint is for Vision Mamba, and model.name is {config.name!r}: for other models of timm set "
            "model.pretrained true and model.args.pretrained_cfg_overlay.file"
        )
    state, about, weights = _read(path / "best.pth" if path.is_dir() else path, config)
    trained_as, trained_on = _arguments(about.get("config")), about.get("class_names")
    # Image size and stride of the checkpoint's model, for resampling; files of other programs do not hold them.
    source: Any = model
    source.pretrained_model_args = {
        name: trained_as[name] for name in ("img_size", "patch_stride") if trained_as.get(name) is not None
    }
    try:
        state = checkpoint_filter_fn(state, model, resampling=config.pretrained_resampling)
    except ValueError as error:
        raise CheckpointError(f"model.checkpoint {path} does not fit {config.name}: {error}") from error
    finally:
        source.pretrained_model_args = {}
    others = class_names is not None and isinstance(trained_on, list) and list(class_names) != trained_on
    new_head = _fit_head_and_channels(state, model, path, others)
    _check_names(state, model, path, new_head)
    model.load_state_dict(state, strict=False)
    _logger.info("%s weights of %s%s", weights, path, ", with a new head" if new_head else "")


def _read(path: Path, config: ModelConfig) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Return a state dict, the file's record of its run, and the kind of weights."""
    wanted = config.pretrained_weights
    try:
        if path.suffix == ".safetensors":
            if wanted == "ema":
                raise CheckpointError(f"model.pretrained_weights must be 'best' or 'raw' for {path}, got 'ema'")
            state, metadata = load_weights(path)
            about = json.loads(metadata.get(METADATA_KEY, "{}"))
            if not isinstance(about, dict):
                raise TypeError(f"its {METADATA_KEY} must hold an object, got a {type(about).__name__}")
            return select_weights(state), about, "the"
        contents = read_checkpoint(path)
        if contents.get("format") == FORMAT:
            contents = load_checkpoint(path)  # read again, to verify the checksums
        kind = wanted if wanted != "best" else "ema" if contents.get("weights") == "ema" else "raw"
        return select_weights(contents, kind), contents, kind
    except (RuntimeError, json.JSONDecodeError, AttributeError, TypeError) as error:
        raise CheckpointError(f"model.checkpoint {path} cannot be used: {error}") from error


def _arguments(config: Any) -> dict[str, Any]:
    """Return the arguments of the model from the settings of a run."""
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(model, dict):
        return {}
    size = model.get("img_size")
    return {**(model.get("args") or {}), "img_size": tuple(size) if isinstance(size, list) else size}


def _fit_head_and_channels(state: dict[str, Tensor], model: VisionMamba, path: Path, other_classes: bool) -> bool:
    """Drop a head of other classes, and adapt the first convolution to the channels; return True for a new head."""
    own = model.state_dict()
    new_head = other_classes or any(
        name in own and (name not in state or state[name].shape != own[name].shape) for name in _HEAD
    )
    for name in _HEAD:
        if new_head or name not in own:
            state.pop(name, None)
    weight = state.get(_FIRST_CONV)
    if weight is not None and weight.shape != own[_FIRST_CONV].shape:
        channels, wanted = weight.shape[1], own[_FIRST_CONV].shape[1]
        if channels == 3:
            state[_FIRST_CONV] = adapt_input_conv(wanted, weight)
        elif channels == 1:
            state[_FIRST_CONV] = weight.expand(-1, wanted, -1, -1) / wanted
        else:
            raise CheckpointError(
                f"model.checkpoint {path} is of a model for {channels} channels, which cannot be adapted to "
                f"model.in_chans = {wanted}: only weights for 1 or 3 channels can"
            )
    return new_head


def _check_names(state: dict[str, Tensor], model: VisionMamba, path: Path, new_head: bool) -> None:
    """Raise unless the state dict has exactly the tensors of the model, apart from a new head."""
    own = model.state_dict()
    left = [name for name in own if name not in state and not (new_head and name in _HEAD)]
    extra = [name for name in state if name not in own]
    if left or extra:
        what = f"it lacks {left[0]!r}" if left else f"it has {extra[0]!r}, which the model lacks"
        raise CheckpointError(f"model.checkpoint {path} does not fit {type(model).__name__}: {what}")
