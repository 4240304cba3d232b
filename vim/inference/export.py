"""Export models to other runtimes; a file appears only after it has given PyTorch's logits."""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vim.models  # noqa: F401  (registers our models with timm)
from vim.data.loaders import build_eval_loader
from vim.data.sources import open_eval_set
from vim.inference.export_formats import FORMATS, Format, Run
from vim.inference.onnx import quantize_onnx
from vim.inference.trained_model import TrainedModel, load_trained_model
from vim.models.build import check_model_name, create_named
from vim.models.detection import Detector, SimpleFeaturePyramid

_DTYPES = {"float32": torch.float32, "float16": torch.float16}
# Largest difference from PyTorch, relative to an output's largest value; float16 rounds to 11 bits in many layers.
_TOLERANCES = {"float32": 1e-4, "float16": 3e-2}
_QUANTIZED = ("none", "int8")
# Images that a file is checked with, besides random ones; those that int8 is checked with, and the share of them whose
# class it must keep.
_CHECKED = 8
_COUNTED = 256
_LEAST_AGREEMENT = 0.9
# What timm raises for files that hold no weights, or another model's.
_UNLOADABLE = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, EOFError, pickle.UnpicklingError)
_HELD_OUT, _SYNTHETIC = "held-out images", "synthetic images"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """The difference between an exported file and PyTorch."""

    difference: float
    """Largest difference of an output, relative to its largest value."""
    agreement: float
    """Share of the images, or of their pixels, with the same most likely class."""
    images: int
    """Number of the images that the agreement is about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Exported:
    """A model to export."""

    network: nn.Module
    """Maps normalised images to a tensor, or to a tuple of them."""
    images: Tensor
    """Images to check it with."""
    origin: str
    """The images, in words."""
    output_names: tuple[str, ...] = ("logits",)


class _Levels(nn.Module):
    """The backbone of a detector, whose levels are a tuple in place of a dictionary."""

    def __init__(self, backbone: SimpleFeaturePyramid) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(images).values())


def export_model(
    model: str,
    out: str,
    format: str = "onnx",
    img_size: int | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    checkpoint_path: str = "",
    pretrained: bool = False,
    dtype: str = "float32",
    quantize: str = "none",
) -> None:
    """Export a model, check the file against PyTorch in its own runtime, and print the result.

    Of a detector the backbone with its pyramid is exported: an output for each level, `stride_4` and so on.

    Args:
        model: A run folder of vim.train, a checkpoint in it, or a name that timm knows, such as vim_tiny_patch16_224.
        out: File to write: .onnx, .xml (openvino, with a .bin beside it), .pte (executorch) or .pt2 (aoti).
        format: onnx, onnx-unrolled (without loops), openvino, executorch or aoti.
        img_size: Side of the square images of a named model, in pixels; 224 if not given.
        num_classes: Outputs of the head of a named model; 1000 if not given.
        in_chans: Channels of the images of a named model; 3 if not given.
        checkpoint_path: File of weights for a named model.
        pretrained: Use the published weights of a named model.
        dtype: float32, or float16 for onnx and onnx-unrolled. States stay in float32.
        quantize: none, or int8 for onnx and onnx-unrolled: linear layers with int8 weights.
    """
    if not model:
        raise ValueError("model must be a run folder, a checkpoint in it, or a name that timm knows, got ''")
    kind = _check(format, out, dtype, quantize)
    int8 = quantize == "int8"
    named: dict[str, Any] = {"img_size": img_size, "num_classes": num_classes, "in_chans": in_chans}
    named |= {"checkpoint_path": checkpoint_path or None, "pretrained": pretrained or None}
    count = _COUNTED if int8 else _CHECKED
    exported = _trained(model, named, count) if Path(model).exists() else _named(model, named)
    if int8 and exported.output_names != ("logits",):
        raise ValueError(f"quantize must be none for {model}: int8 is checked by classes, and its outputs are maps")
    sys.stderr.write(f"exporting {model} as {format}, and checking it on random and on {exported.origin}\n")
    samples = torch.cat([torch.randn(3, *exported.images.shape[1:]), exported.images]).to(_DTYPES[dtype])
    checked = write_checked(
        exported.network.eval().to(_DTYPES[dtype]),
        Path(out),
        kind,
        samples,
        # Quantised logits differ; what they decide should not, where it is known to mean something.
        tolerance=None if int8 else _TOLERANCES[dtype],
        least=_LEAST_AGREEMENT if int8 and exported.origin == _HELD_OUT else 0.0,
        int8=int8,
        output_names=exported.output_names,
    )
    agreement = f", the same class for {100 * checked.agreement:.1f} % of {checked.images} {exported.origin}"
    described = f"{kind.describe(Path(out))}, largest difference from PyTorch {checked.difference:.1e}"
    sys.stdout.write(f"{out}: {described}{agreement if int8 else ''}\n")


def _check(format: str, out: str, dtype: str, quantize: str) -> Format:
    """Return the format, after a check of everything that can be checked before a model is made."""
    if format not in FORMATS:
        raise ValueError(f"format must be one of {sorted(FORMATS)}, got {format!r}")
    kind, path, is_onnx = FORMATS[format], Path(out), format.startswith("onnx")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {sorted(_DTYPES)}, got {dtype!r}")
    if dtype != "float32" and not is_onnx:
        raise ValueError(f"dtype must be float32 for format {format}, got {dtype!r}")
    if quantize not in _QUANTIZED:
        raise ValueError(f"quantize must be one of {sorted(_QUANTIZED)}, got {quantize!r}")
    if quantize != "none" and not is_onnx:
        raise ValueError(f"quantize must be none for format {format}, got {quantize!r}: int8 is for onnx formats")
    if quantize != "none" and dtype != "float32":
        raise ValueError(f"dtype must be float32 with quantize {quantize}, got {dtype!r}")
    if path.suffix != kind.suffix:
        raise ValueError(f"out must end in {kind.suffix} for format {format}, got {out!r}")
    if path.is_dir():
        raise ValueError(f"out must be a file, and {out} is a folder: name a file in it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ValueError(f"out must be in a folder, and {folder} is a file")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"out must be in a folder that can be written, and {folder} cannot")
    missing = [name for name in kind.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"format {format} needs {missing[0]}: {kind.hint}")
    return kind


def _trained(source: str, named: dict[str, Any], count: int) -> _Exported:
    """Load a model of vim.train."""
    for name, value in named.items():
        if value is not None:
            raise ValueError(f"{name} must be left out for {source}, which defines its own model, got {value!r}")
    trained = load_trained_model(source)
    images, origin = _own_images(trained, count)
    if not isinstance(trained.model, Detector):
        return _Exported(network=trained.model, images=images, origin=origin)
    backbone: Any = trained.model.backbone
    names = tuple(f"stride_{stride}" for stride in backbone.strides)
    return _Exported(network=_Levels(backbone), images=images, origin=origin, output_names=names)


def _named(name: str, named: dict[str, Any]) -> _Exported:
    """Create a model of timm."""
    settings = {"img_size": 224, "in_chans": 3} | {key: value for key, value in named.items() if value is not None}
    weights = settings.pop("checkpoint_path", None)
    check_model_name(name)
    network = create_named(name, **settings)
    if weights is not None:
        try:
            timm.models.load_checkpoint(network, weights)
        except _UNLOADABLE as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"checkpoint_path {weights} does not load: {type(error).__name__}: {reason}") from error
    images = _synthetic(settings["in_chans"], (settings["img_size"], settings["img_size"]))
    return _Exported(network=network, images=images, origin=_SYNTHETIC)


def _synthetic(in_chans: int, image_shape: tuple[int, int]) -> Tensor:
    """Return smooth random images with some noise, (batch, channels, height, width)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(_CHECKED, in_chans, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, image_shape, mode="bicubic")
    return smooth + 0.1 * torch.randn(smooth.shape, generator=generator)


def _own_images(trained: TrainedModel, count: int) -> tuple[Tensor, str]:
    """Return held-out images of the model's run, or synthetic ones if they are gone, and what they are in words."""
    config = trained.config
    if config is not None and trained.task == "classification":
        try:
            dataset, _ = open_eval_set(config, config.data.val_split, trained.class_names)
            batches, _ = build_eval_loader(dataset, config, torch.device("cpu"))
            size = config.eval_batch_size or config.micro_batch_size
            return torch.cat([images for images, _ in islice(batches, -(-count // size))])[:count], _HELD_OUT
        except (ValueError, OSError, ModuleNotFoundError) as error:
            sys.stderr.write(f"the run's held-out images cannot be read ({error})\n")
    return _synthetic(trained.preprocessing.in_chans, trained.preprocessing.image_shape), _SYNTHETIC


def write_checked(
    model: nn.Module,
    path: Path,
    kind: Format,
    samples: Tensor,
    tolerance: float | None,
    least: float = 0.0,
    int8: bool = False,
    output_names: Sequence[str] = ("logits",),
) -> Checked:
    """Write `model` to `path` after checking the file in its runtime.

    Args:
        model: The model, in eval mode, on the CPU. It returns a tensor, or a tuple of several.
        path: File to write, if the check passes.
        kind: The format.
        samples: Images, (batch, channels, height, width); the first three are random.
        tolerance: Largest accepted difference of an output, relative to its largest value; `None` accepts any.
        least: Smallest accepted share of the samples, without the first three, whose class is kept.
        int8: Quantise an ONNX file.
        output_names: Name of each output; formats other than ONNX and OpenVINO have none.

    Raises:
        RuntimeError: The exported model differs by more than `tolerance`, or in too many classes.
        OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        draft = Path(folder) / path.name
        kind.write(model, samples[:2], draft, output_names)
        if int8:
            quantize_onnx(draft)
        checked = _compare(model, kind.open(draft), samples, kind.any_batch)
        difference = checked.difference
        if tolerance is not None and not difference <= tolerance:
            raise RuntimeError(
                f"the exported model differs from PyTorch by {difference:.2g}, more than {tolerance:.2g}"
            )
        if not checked.agreement >= least:
            raise RuntimeError(
                f"the exported model keeps the class of {100 * checked.agreement:.1f} % of {checked.images} images, "
                f"less than {100 * least:.0f} %: leave quantize out"
            )
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == draft):  # the file that was asked for last
            os.replace(file, path.with_name(file.name))
    return checked


@torch.no_grad()
def _compare(model: nn.Module, run: Run, samples: Tensor, any_batch: bool) -> Checked:
    """Compare all outputs over batches of several sizes, and the classes of the first after the random images."""
    batches = samples.split(1)[: 3 + _CHECKED]
    if any_batch:
        batches = (samples[:1], samples[1:3], *samples[3:].split(32))
    expected, found = [], []
    for batch in batches:
        outputs = model(batch)
        expected.append((outputs,) if isinstance(outputs, Tensor) else outputs)
        found.append(run(batch))
    wanted, got = ([torch.cat(parts).float() for parts in zip(*calls, strict=True)] for calls in (expected, found))
    differences = [(b - a).abs().max() / a.abs().max() for a, b in zip(wanted, got, strict=True)]
    same = wanted[0][3:].argmax(1) == got[0][3:].argmax(1)
    return Checked(difference=float(max(differences)), agreement=float(same.float().mean()), images=len(same))
