"""Extract weights from training checkpoints, also in the original's layout."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
from torch import Tensor

import vim.models  # noqa: F401  (registers our models)
from vim.checkpoints.io import atomic_writer, save_weights
from vim.models.pretrained import Weights, read_checkpoint, select_weights

_SIZES = {192: "tiny", 384: "small", 768: "base"}
_STRIDE8_TOKENS = 730  # 27 x 27 patches and a class token
_ROPE_TINY = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_rope_also_residual_with_cls_token"


class Match(NamedTuple):
    """Comparison of a state dict with a model, by names of tensors.

    Attributes:
        model: Name of the model.
        same: Tensors of both, with the same shape.
        reshaped: Tensors of both, with different shapes.
        missing: Tensors that only the model has.
        left_over: Tensors that only the state dict has.
    """

    model: str
    same: list[str]
    reshaped: list[str]
    missing: list[str]
    left_over: list[str]

    def __str__(self) -> str:
        """Return a summary in one line."""
        parts = [f"{len(self.same)} tensors match {self.model}"]
        for what, names in (("of another shape", self.reshaped), ("missing", self.missing), ("extra", self.left_over)):
            if names:
                parts.append(f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")
        return "; ".join(parts)


def convert(source: str, out: str, weights: Literal["raw", "ema"] = "raw", model: str = "") -> None:
    """Write the weights of a training checkpoint to a separate file, and print a summary.

    Args:
        source: A run folder, a checkpoint of the original, of vim.train or of timm, or a safetensors file.
        out: File to write: .safetensors for timm and this library, .pth for the original's scripts.
        weights: raw, or ema for the moving average.
        model: The timm model that the weights must fit; the nearest registered one if it is not given.
    """
    sys.stdout.write(f"{convert_checkpoint(Path(source), Path(out), weights, model)}\n")


def convert_checkpoint(source: Path, out: Path, weights: Weights = "raw", model: str = "") -> str:
    """Write the weights of a checkpoint to a separate file; see `convert`.

    Returns:
        A summary in one line.

    Raises:
        FileNotFoundError: `source`, or the folder of `out`, does not exist.
        RuntimeError: `source` cannot be read safely.
        ValueError: `source` holds the weights of another model, or an argument is wrong.
    """
    if out.suffix not in (".safetensors", ".pth"):
        raise ValueError(f"out must end in .safetensors or .pth, got {str(out)!r}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent} to write to")
    if model and not timm.is_model(model):
        raise ValueError(f"model must be one that timm knows, got {model!r}")
    source = source / "best.pth" if source.is_dir() else source
    checkpoint = read_checkpoint(source)
    state_dict = select_weights(checkpoint, weights)
    name = model or nearest_model(state_dict)
    match = compare(state_dict, name)
    if model and (match.reshaped or match.missing or match.left_over):
        raise ValueError(f"{source} does not fit: {match}")
    if out.suffix == ".safetensors":
        save_weights(out, state_dict, {"format": "pt", "architecture": name, "weights": weights})
    else:
        _write_for_the_original(out, checkpoint, state_dict, weights)
    size = out.stat().st_size / 2**20
    return f"{match}; {out}: {weights} weights, {size:.1f} MiB"


def nearest_model(state_dict: dict[str, Tensor]) -> str:
    """Return the name of the registered model that fits a state dict best.

    Raises:
        ValueError: It is not of Vision Mamba, or its width is not registered.
    """
    proj = state_dict.get("patch_embed.proj.weight")
    if proj is None or not any(re.match(r"layers\.\d+\.mixer\.in_proj\.", name) for name in state_dict):
        raise ValueError(f"the checkpoint is not of Vision Mamba: it has {', '.join(sorted(state_dict)[:3])}, ...")
    if proj.shape[0] not in _SIZES:
        raise ValueError(f"no registered model has width {proj.shape[0]}, but {sorted(_SIZES)}")
    if "rope.freqs_cos" in state_dict:
        return _ROPE_TINY
    pos_embed = state_dict.get("pos_embed")
    stride8 = pos_embed is not None and pos_embed.shape[1] == _STRIDE8_TOKENS and proj.shape[0] != 768
    return f"vim_{_SIZES[proj.shape[0]]}_patch16_{'stride8_' if stride8 else ''}224"


def compare(state_dict: dict[str, Tensor], name: str) -> Match:
    """Compare a state dict with the registered model `name`, built with the same number of classes."""
    head = state_dict.get("head.weight")
    with torch.device("meta"):
        own = timm.create_model(name, num_classes=head.shape[0] if head is not None and head.ndim else 0).state_dict()
    both = [key for key in own if key in state_dict]
    return Match(
        name,
        [key for key in both if own[key].shape == state_dict[key].shape],
        [key for key in both if own[key].shape != state_dict[key].shape],
        [key for key in own if key not in state_dict],
        [key for key in state_dict if key not in own],
    )


def _write_for_the_original(out: Path, checkpoint: dict[str, Any], chosen: dict[str, Tensor], weights: Weights) -> None:
    """Write the entries that the original's scripts read: "model", and "model_ema" if there is an average."""
    entries = {"model": chosen}
    if weights == "raw" and any(isinstance(checkpoint.get(name), dict) for name in ("model_ema", "state_dict_ema")):
        entries["model_ema"] = select_weights(checkpoint, "ema")
    # Copies, since saving a view of a memory-mapped file would write the whole file.
    contents = {name: {key: t.clone() for key, t in state.items()} for name, state in entries.items()}
    with atomic_writer(out) as file:
        torch.save(contents, file)
