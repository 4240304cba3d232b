"""Export models to ONNX."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import vim.models  # noqa: F401  (registers our models with timm)
from vim.inference.trained_model import load_trained_model
from vim.models.build import check_model_name, create_named
from vim.ops import exportable_ops

_DTYPES = {"float32": torch.float32, "float16": torch.float16}
# Largest difference from PyTorch, relative to the largest logit; float16 rounds to 11 bits in each of many layers.
_TOLERANCES = {"float32": 1e-4, "float16": 3e-2}


def export_onnx(
    model: str,
    out: str,
    img_size: int | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    checkpoint_path: str = "",
    pretrained: bool = False,
    dtype: str = "float32",
) -> None:
    """Export a model with a dynamic batch size, check it in onnxruntime and print the result.

    Args:
        model: A run folder of vim.train, a checkpoint in it, or a name that timm knows, such as vim_tiny_patch16_224.
        out: File to write, ending in .onnx.
        img_size: Side of the square images of a named model, in pixels; 224 if not given.
        num_classes: Outputs of the head of a named model; 1000 if not given.
        in_chans: Channels of the images of a named model; 3 if not given.
        checkpoint_path: File of weights for a named model.
        pretrained: Use the published weights of a named model.
        dtype: float32 or float16. States stay in float32.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {sorted(_DTYPES)}, got {dtype!r}")
    if not out.endswith(".onnx"):
        raise ValueError(f"out must end in .onnx, got {out!r}")
    named: dict[str, Any] = {"img_size": img_size, "num_classes": num_classes, "in_chans": in_chans}
    named |= {"checkpoint_path": checkpoint_path or None, "pretrained": pretrained or None}
    network, channels, image_shape = _trained(model, named) if Path(model).exists() else _named(model, named)
    sys.stderr.write(f"exporting {model}, and checking it in onnxruntime\n")
    error = write_onnx(network.eval().to(_DTYPES[dtype]), Path(out), channels, image_shape, _TOLERANCES[dtype])
    sys.stdout.write(f"{out}: {describe_onnx(Path(out))}, largest difference from PyTorch {error:.1e}\n")


def _trained(source: str, named: dict[str, Any]) -> tuple[nn.Module, int, tuple[int, int]]:
    """Load a model of vim.train; return it with the channels and the size of its images."""
    for name, value in named.items():
        if value is not None:
            raise ValueError(f"{name} must be left out for {source}, which defines its own model, got {value!r}")
    trained = load_trained_model(source)
    return trained.model, trained.preprocessing.in_chans, trained.preprocessing.image_shape


def _named(name: str, named: dict[str, Any]) -> tuple[nn.Module, int, tuple[int, int]]:
    """Create a model of timm; return it with the channels and the size of its images."""
    settings = {"img_size": 224, "in_chans": 3} | {key: value for key, value in named.items() if value is not None}
    check_model_name(name)
    network = create_named(name, **settings)
    return network, settings["in_chans"], (settings["img_size"], settings["img_size"])


def write_onnx(model: nn.Module, path: Path, in_chans: int, image_shape: tuple[int, int], tolerance: float) -> float:
    """Write `model` to `path`, with a dynamic batch size, after checking it in onnxruntime.

    Args:
        model: The model, in eval mode, on the CPU.
        path: File to write, if the check passes.
        in_chans: Channels of the images.
        image_shape: Height and width of the images, in pixels.
        tolerance: Largest accepted difference, relative to the largest logit.

    Returns:
        The largest difference from PyTorch, relative to the largest logit, over two batch sizes.

    Raises:
        RuntimeError: The exported model differs by more than `tolerance`.
    """
    dtype = next(model.parameters()).dtype
    images = torch.randn(2, in_chans, *image_shape, dtype=dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        draft = Path(folder) / path.name
        with torch.no_grad(), exportable_ops():
            program = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                verbose=False,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
            )
        assert program is not None
        program.save(draft)
        error = max(_difference(model, draft, batch) for batch in (images, torch.cat([images, images[:1]])))
        if not error <= tolerance:
            raise RuntimeError(f"the exported model differs from PyTorch by {error:.2g}, more than {tolerance:.2g}")
        os.replace(draft, path)
    return error


@torch.no_grad()
def _difference(model: nn.Module, path: Path, images: torch.Tensor) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    expected = model(images).float().numpy()
    return float(np.abs(logits.astype(np.float32) - expected).max() / np.abs(expected).max())


def describe_onnx(path: Path) -> str:
    """Return size, opset and number of nodes, in words."""
    import onnx

    proto = onnx.load(path)
    opset = next(entry.version for entry in proto.opset_import if entry.domain == "")
    return f"{path.stat().st_size / 2**20:.1f} MiB, opset {opset}, {len(proto.graph.node)} nodes"
