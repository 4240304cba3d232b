"""Published weights: fetch their files, read them without running code, and fit them to a model."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import pickle
import re
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_patch_embed
from timm.models import PretrainedCfg
from torch import Tensor

from vim import git_lfs
from vim.layers.pos_embed import cls_indices, resample_grid, resample_pos_embed
from vim.layers.token_sequence import extract_tokens
from vim.models.state_dicts import Weights, select_weights
from vim.models.vision_mamba import VisionMamba

_logger = logging.getLogger(__name__)

Resampling = Literal["exact", "reference"]
# Names that NumPy's scalars and arrays are pickled with, in NumPy 1 and 2.
_NUMPY_NAMES = (
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
)
# What torch's restricted loader raises for a file with malformed contents, besides `UnpicklingError`.
_MALFORMED = (
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    OSError,
    zipfile.BadZipFile,
)
# Seconds to wait for the first answer of the hub.
_HUB_TIMEOUT = 5.0


def find_weights(cfg: PretrainedCfg) -> Path | None:
    """Return the local file of published weights; fetch it from the hub if it is not cached.

    Args:
        cfg: timm's description of the weights.

    Returns:
        The file, or `None` if timm loads the weights itself: from a state dict, a URL, "hf-hub:" or "local-dir:".

    Raises:
        FileNotFoundError: `cfg.file` does not exist.
        RuntimeError: No weights are published, or the hub cannot be reached; the message says what to do.
    """
    if cfg.state_dict or cfg.source in ("hf-hub", "local-dir") or (cfg.url and not cfg.file and not cfg.hf_hub_id):
        return None
    if cfg.file:
        return Path(cfg.file)
    if not cfg.hf_hub_id or not cfg.hf_hub_filename:
        raise RuntimeError(f"no weights are published for {cfg.architecture}; use pretrained=False or checkpoint_path=")
    return _fetch(cfg.hf_hub_id, cfg.hf_hub_filename)


def _fetch(hub_id: str, filename: str) -> Path:
    """Return the local copy of a file on the hub, from the cache or fetched."""
    repo, _, revision = hub_id.partition("@")
    cached = try_to_load_from_cache(repo, filename, revision=revision or None)
    if isinstance(cached, str):
        return Path(cached)
    url = hf_hub_url(repo, filename, revision=revision or None)
    try:
        if not constants.HF_HUB_OFFLINE:
            _check_reachable(url)
        return Path(hf_hub_download(repo, filename, revision=revision or None))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RuntimeError(
            f"{filename} of {repo} could not be fetched ({reason}): download {url} elsewhere and pass "
            "checkpoint_path=FILE (--model.checkpoint FILE on a command line), or use pretrained=False "
            "(--model.pretrained false)"
        ) from error


def _check_reachable(url: str) -> None:
    """Raise unless the hub can be reached; its own client would retry for half a minute."""
    # An HTTP error proves that the hub is there, and its client reports it better.
    with (
        contextlib.suppress(urllib.error.HTTPError),
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_HUB_TIMEOUT),
    ):
        pass


class _Ignored:
    """A stand-in for NumPy scalars and arrays in a checkpoint; it discards its contents."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _allowed_classes() -> contextlib.AbstractContextManager[None]:
    """Allow torch's restricted loader the classes that training loops save; NumPy's are replaced by `_Ignored`."""
    ignored: list[Any] = [(_Ignored, name) for name in _NUMPY_NAMES]
    return torch.serialization.safe_globals([argparse.Namespace, *ignored])


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file of tensors, numbers and text, without running any code in it.

    Args:
        path: A safetensors file, or a file written by `torch.save`. `argparse.Namespace`, which the released files
            hold, is allowed. NumPy scalars and arrays are skipped. Other classes are refused.

    Returns:
        The contents, on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        RuntimeError: The file is damaged, of another kind, or needs classes that are refused; the message names them.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no checkpoint {file}")
    if git_lfs.is_pointer_file(file):
        raise RuntimeError(f"{file} cannot be read: {git_lfs.POINTER}")
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise RuntimeError(f"{file} is truncated or not a safetensors file: {error}") from error
    try:
        with _allowed_classes():
            contents = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise RuntimeError(f"{file} was not loaded: {_foreign_classes(file)}") from error
    except PermissionError as error:
        raise RuntimeError(f"{file} cannot be read: {error.strerror}") from error
    except _MALFORMED as error:
        raise RuntimeError(f"{file} is damaged or not a PyTorch checkpoint") from error
    if not isinstance(contents, dict):
        raise RuntimeError(f"{file} must hold a dict, got {type(contents).__name__}")
    return contents


def _foreign_classes(file: Path) -> str:
    """Return in words why the restricted loader refused a file."""
    try:
        with _allowed_classes():
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except (*_MALFORMED, pickle.UnpicklingError):
        names = []
    if not names:
        return "it is damaged or not a PyTorch checkpoint"
    if any(name.startswith("torch.nn.modules.") for name in names):
        return (
            "it holds a whole model, and loading classes from a file can run code; in the program that wrote it, save "
            "the state dict: torch.save(model.state_dict(), FILE)"
        )
    return f"it needs {', '.join(sorted(names))}, and loading classes from a file can run code"


def checkpoint_filter_fn(
    state_dict: dict[str, Any],
    model: VisionMamba,
    weights: Weights = "raw",
    resampling: Resampling = "exact",
) -> dict[str, Tensor]:
    """Return the weights of a checkpoint in a form that fits `model`; timm's `pretrained_filter_fn`.

    Tensors that depend on the image or patch size are resampled. Class tokens are dropped for a model without them,
    and their position embeddings move to the positions that the model has.

    Args:
        state_dict: Names to tensors, or a training checkpoint that holds such a dict.
        model: The model that receives the weights.
        weights: Which weights of a checkpoint, see `select_weights`.
        resampling: "exact" resamples the position embedding of the patches only. "reference" repeats the original's
            fine-tuning: it always treats the first entry as the class token's, and the rest as the grid.

    Raises:
        ValueError: The checkpoint is of another architecture, width or depth; the message names both.
    """
    if resampling not in ("exact", "reference"):
        raise ValueError(f"resampling must be 'exact' or 'reference', got {resampling!r}")
    state_dict = select_weights(state_dict, weights)
    for name, axes in (("pos_embed", 3), ("cls_token", 3)):
        if name in state_dict and state_dict[name].dim() != axes:
            raise ValueError(f"the checkpoint's {name} must have {axes} axes, got {tuple(state_dict[name].shape)}")
    _check_architecture(state_dict, model)
    source_cls = _source_cls_position(state_dict, model)
    _fit_pos_embed(state_dict, model, source_cls, resampling)
    if model.cls_position == "none":
        for name in ("cls_token", "cls_token_head", "cls_token_tail"):
            if state_dict.pop(name, None) is not None:
                _logger.info("the checkpoint's %s is dropped: the model has no class token", name)
    proj = state_dict.get("patch_embed.proj.weight")
    if proj is not None and proj.shape[-2:] != model.patch_embed.proj.weight.shape[-2:]:
        state_dict["patch_embed.proj.weight"] = resample_patch_embed(proj, list(model.patch_embed.patch_size))
    if model.rotary != "none":
        # The tables follow from the grid; tables of another grid must not replace the model's.
        for name in ("rope.freqs_cos", "rope.freqs_sin"):
            if name in state_dict and state_dict[name].shape != model.get_buffer(name).shape:
                state_dict[name] = model.get_buffer(name)
    _check_shapes(state_dict, model)
    return state_dict


def _check_architecture(state_dict: dict[str, Tensor], model: VisionMamba) -> None:
    blocks = {int(match[1]) for name in state_dict if (match := re.match(r"layers\.(\d+)\.mixer\.", name))}
    if not blocks:
        raise ValueError(
            "the checkpoint is not of Vision Mamba: it has no 'layers.0.mixer.*', but "
            f"{', '.join(map(repr, sorted(state_dict)[:3]))}, ..."
        )
    if max(blocks) + 1 != model.depth:
        raise ValueError(f"the checkpoint has {max(blocks) + 1} blocks, the model has depth={model.depth}")
    proj = state_dict.get("patch_embed.proj.weight")
    if proj is not None and proj.shape[0] != model.embed_dim:
        raise ValueError(f"the checkpoint has width {proj.shape[0]}, the model has embed_dim={model.embed_dim}")


def _source_cls_position(state_dict: dict[str, Tensor], model: VisionMamba) -> str:
    """Return the checkpoint's `cls_position`; for a single class token it is a guess, since tensors do not tell it."""
    if "cls_token_head" in state_dict:
        source = "double"
    elif "cls_token" not in state_dict:
        source = "none"
    elif model.cls_position in ("head", "middle", "random"):
        source = model.cls_position
    else:
        # The released models have the class token in the middle, except the first one, which has rotary tables.
        source = "head" if "rope.freqs_cos" in state_dict else "middle"
    tokens = len(cls_indices(source, 0))
    if model.num_prefix_tokens not in (0, tokens):
        raise ValueError(
            f"the checkpoint has {tokens} class tokens, the model has cls_position={model.cls_position!r}; "
            f"create it with cls_position={source!r}"
        )
    return source


def _fit_pos_embed(state_dict: dict[str, Tensor], model: VisionMamba, source_cls: str, resampling: Resampling) -> None:
    pos_embed = state_dict.get("pos_embed")
    if pos_embed is None or model.pos_embed is None:
        return
    places = len(cls_indices(source_cls, 0))
    old_grid = _source_grid(state_dict, model, pos_embed.shape[1] - places)
    new_grid = model.patch_embed.grid_size
    if resampling == "reference":
        if places != 1 or model.num_prefix_tokens != 1:
            raise ValueError("resampling='reference' needs one class token in the checkpoint and in the model")
        state_dict["pos_embed"] = _resample_as_the_original(pos_embed, old_grid, new_grid)
        return
    if model.cls_position == "none" and places:
        _, pos_embed = extract_tokens(pos_embed, cls_indices(source_cls, old_grid[0] * old_grid[1]))
    state_dict["pos_embed"] = resample_pos_embed(pos_embed, old_grid, new_grid, model.cls_position)


def _source_grid(state_dict: dict[str, Tensor], model: VisionMamba, patches: int) -> tuple[int, int]:
    """Return the grid (rows, columns) of the checkpoint's position embedding."""
    proj = state_dict.get("patch_embed.proj.weight")
    kernel = model.patch_embed.patch_size if proj is None else (proj.shape[-2], proj.shape[-1])
    source_args = getattr(model, "pretrained_model_args", {})
    cfg = getattr(model, "pretrained_cfg", None) or {}
    size = source_args.get("img_size") or tuple(cfg.get("input_size", (3, 224, 224)))[-2:]
    size = (size, size) if isinstance(size, int) else tuple(size)
    stride = source_args.get("patch_stride") or model.patch_embed.stride
    for step in ((stride, stride) if isinstance(stride, int) else tuple(stride), kernel):
        rows, columns = ((s - k) // t + 1 for s, k, t in zip(size, kernel, step, strict=True))
        if rows * columns == patches:
            return rows, columns
    if model.patch_embed.num_patches == patches:
        return model.patch_embed.grid_size
    side = math.isqrt(max(patches, 0))
    if side < 1 or side * side != patches:
        raise ValueError(f"pos_embed must come from a square grid of patches, got {patches} patches")
    return side, side


def _resample_as_the_original(pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resample as the original does before fine-tuning; it is correct only if the class token comes first."""
    if old_grid == new_grid:
        return pos_embed
    return torch.cat([pos_embed[:, :1], resample_grid(pos_embed[:, 1:], old_grid, new_grid)], dim=1)


def _check_shapes(state_dict: dict[str, Tensor], model: VisionMamba) -> None:
    """Raise unless every tensor has the model's shape, except for the head and the image channels: timm adapts them."""
    for name, own in model.state_dict().items():
        tensor = state_dict.get(name)
        if tensor is None or name.startswith("head.") or tensor.shape == own.shape:
            continue
        if name == "patch_embed.proj.weight" and tensor.shape[0] == own.shape[0]:
            continue
        raise ValueError(f"the checkpoint's {name} has shape {tuple(tensor.shape)}, the model's {tuple(own.shape)}")
