"""Export models to ONNX."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import vim.models  # noqa: F401  (registers our models with timm)
from vim.inference.trained_model import load_trained_model
from vim.models.build import check_model_name, create_named
from vim.models.detection import Detector, SimpleFeaturePyramid
from vim.ops import exportable_ops

_DTYPES = {"float32": torch.float32, "float16": torch.float16}
# Largest difference from PyTorch, relative to the largest logit; float16 rounds to 11 bits in each of many layers.
_TOLERANCES = {"float32": 1e-4, "float16": 3e-2}


class _Exported(NamedTuple):
    """A model to export."""

    network: nn.Module
    """Maps normalised images to a tensor, or to a tuple of them."""
    in_chans: int
    image_shape: tuple[int, int]
    output_names: tuple[str, ...] = ("logits",)


class _Levels(nn.Module):
    """The backbone of a detector, whose levels are a tuple in place of a dictionary."""

    def __init__(self, backbone: SimpleFeaturePyramid) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(images).values())


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

    Of a detector the backbone with its pyramid is exported: an output for each level, `stride_4` and so on.

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
    network, channels, shape, names = _trained(model, named) if Path(model).exists() else _named(model, named)
    sys.stderr.write(f"exporting {model}, and checking it in onnxruntime\n")
    network = network.eval().to(_DTYPES[dtype])
    error = write_onnx(network, Path(out), channels, shape, _TOLERANCES[dtype], names)
    sys.stdout.write(f"{out}: {describe_onnx(Path(out))}, largest difference from PyTorch {error:.1e}\n")


def _trained(source: str, named: dict[str, Any]) -> _Exported:
    """Load a model of vim.train."""
    for name, value in named.items():
        if value is not None:
            raise ValueError(f"{name} must be left out for {source}, which defines its own model, got {value!r}")
    trained = load_trained_model(source)
    images = trained.preprocessing.in_chans, trained.preprocessing.image_shape
    if isinstance(trained.model, Detector):
        backbone: Any = trained.model.backbone
        return _Exported(_Levels(backbone), *images, tuple(f"stride_{stride}" for stride in backbone.strides))
    return _Exported(trained.model, *images)


def _named(name: str, named: dict[str, Any]) -> _Exported:
    """Create a model of timm."""
    settings = {"img_size": 224, "in_chans": 3} | {key: value for key, value in named.items() if value is not None}
    check_model_name(name)
    network = create_named(name, **settings)
    return _Exported(network, settings["in_chans"], (settings["img_size"], settings["img_size"]))


def write_onnx(
    model: nn.Module,
    path: Path,
    in_chans: int,
    image_shape: tuple[int, int],
    tolerance: float,
    output_names: Sequence[str] = ("logits",),
) -> float:
    """Write `model` to `path`, with a dynamic batch size, after checking it in onnxruntime.

    Args:
        model: The model, in eval mode, on the CPU. It returns a tensor, or a tuple of several.
        path: File to write, if the check passes.
        in_chans: Channels of the images.
        image_shape: Height and width of the images, in pixels.
        tolerance: Largest accepted difference of an output, relative to its largest value.
        output_names: Name of each output.

    Returns:
        The largest difference from PyTorch, relative to the largest value of an output, over two batch sizes.

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
                output_names=list(output_names),
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
def _difference(model: nn.Module, path: Path, images: Tensor) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images.numpy()})
    expected = model(images)
    outputs = [expected] if isinstance(expected, Tensor) else list(expected)
    return max(_relative(values, wanted.float().numpy()) for values, wanted in zip(found, outputs, strict=True))


def _relative(found: Any, expected: Any) -> float:
    """Return the largest difference of two arrays, relative to the largest expected value."""
    return float(np.abs(found.astype(np.float32) - expected).max() / np.abs(expected).max())


def describe_onnx(path: Path) -> str:
    """Return size, opset and number of nodes, in words."""
    import onnx

    proto = onnx.load(path)
    opset = next(entry.version for entry in proto.opset_import if entry.domain == "")
    return f"{path.stat().st_size / 2**20:.1f} MiB, opset {opset}, {len(proto.graph.node)} nodes"
