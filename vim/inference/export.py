"""Export models to other runtimes; a file appears only after it has given PyTorch's logits."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

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

_DTYPES = {"float32": torch.float32, "float16": torch.float16}
# Largest difference from PyTorch, relative to the largest logit; float16 rounds to 11 bits in each of many layers.
_TOLERANCES = {"float32": 1e-4, "float16": 3e-2}
_QUANTIZED = ("none", "int8")
# Images that a file is checked with, besides random ones, and the share of them whose class int8 must keep.
_CHECKED = 8
_COUNTED = 256
_LEAST_AGREEMENT = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """How near an exported file is to PyTorch."""

    difference: float
    """Largest difference of a logit, relative to the largest logit."""
    agreement: float
    """Share of the images with the same most likely class."""
    images: int
    """Number of the images that the agreement is about."""


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
    kind = _check(format, out, dtype, quantize)
    named: dict[str, Any] = {"img_size": img_size, "num_classes": num_classes, "in_chans": in_chans}
    named |= {"checkpoint_path": checkpoint_path or None, "pretrained": pretrained or None}
    trained = _trained(model, named) if Path(model).exists() else None
    if trained is None:
        network, channels, image_shape = _named(model, named)
        images, origin = _synthetic(channels, image_shape), "synthetic images"
    else:
        network, channels = trained.model, trained.preprocessing.in_chans
        image_shape = trained.preprocessing.image_shape
        images, origin = _own_images(trained, channels, image_shape)
    sys.stderr.write(f"exporting {model} as {format}, and checking it on random and on {origin}\n")
    network = network.eval().to(_DTYPES[dtype])
    samples = torch.cat([torch.randn(3, channels, *image_shape), images]).to(_DTYPES[dtype])
    int8 = quantize == "int8"
    # Quantised logits differ; what they decide should not, where it is known to mean something.
    least = _LEAST_AGREEMENT if trained is not None and origin != "synthetic images" else 0.0
    checked = write_checked(
        network, Path(out), kind, samples, tolerance=None if int8 else _TOLERANCES[dtype], int8=int8, least=least
    )
    agreement = f", the same class for {100 * checked.agreement:.1f} % of {checked.images} {origin}" if int8 else ""
    described = f"{kind.describe(Path(out))}, largest difference from PyTorch {checked.difference:.1e}"
    sys.stdout.write(f"{out}: {described}{agreement}\n")


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
    missing = [name for name in kind.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"format {format} needs {missing[0]}: {kind.hint}")
    return kind


def _trained(source: str, named: dict[str, Any]) -> TrainedModel:
    """Load a model of vim.train."""
    for name, value in named.items():
        if value is not None:
            raise ValueError(f"{name} must be left out for {source}, which defines its own model, got {value!r}")
    return load_trained_model(source)


def _named(name: str, named: dict[str, Any]) -> tuple[nn.Module, int, tuple[int, int]]:
    """Create a model of timm; return it with the channels and the size of its images."""
    settings = {"img_size": 224, "in_chans": 3} | {key: value for key, value in named.items() if value is not None}
    check_model_name(name)
    network = create_named(name, **settings)
    return network, settings["in_chans"], (settings["img_size"], settings["img_size"])


def _synthetic(in_chans: int, image_shape: tuple[int, int], count: int = _CHECKED) -> Tensor:
    """Return smooth random images with some noise, (count, channels, height, width)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, in_chans, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, image_shape, mode="bicubic")
    return smooth + 0.1 * torch.randn(smooth.shape, generator=generator)


def _own_images(trained: TrainedModel, in_chans: int, image_shape: tuple[int, int]) -> tuple[Tensor, str]:
    """Return held-out images of the model's run, or synthetic ones if they are gone, and what they are in words."""
    config = trained.config
    if config is not None and trained.task == "classification":
        try:
            dataset, _ = open_eval_set(config, config.data.val_split, trained.class_names)
            batches, _ = build_eval_loader(dataset, config, torch.device("cpu"))
            size = config.eval_batch_size or config.micro_batch_size
            images = torch.cat([images for images, _ in islice(batches, -(-_COUNTED // size))])[:_COUNTED]
        except (ValueError, OSError, ModuleNotFoundError) as error:
            sys.stderr.write(f"the run's held-out images cannot be read ({error})\n")
        else:
            return images, "held-out images"
    return _synthetic(in_chans, image_shape), "synthetic images"


def write_checked(
    model: nn.Module,
    path: Path,
    kind: Format,
    samples: Tensor,
    tolerance: float | None,
    int8: bool = False,
    least: float = 0.0,
) -> Checked:
    """Write `model` to `path` after checking the file in its runtime.

    Args:
        model: The model, in eval mode, on the CPU.
        path: File to write, if the check passes.
        kind: The format.
        samples: Images, (batch, channels, height, width); the first three are random.
        tolerance: Largest accepted difference, relative to the largest logit; `None` accepts any.
        int8: Quantise an ONNX file.
        least: Smallest accepted share of the samples, without the first three, whose class is kept.

    Raises:
        RuntimeError: The exported model differs by more than `tolerance`, or in too many classes.
        OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        draft = Path(folder) / path.name
        kind.write(model, samples[:2], draft)
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
    sizes = [1, 2, *[32] * len(samples)] if any_batch else [1] * (3 + _CHECKED)
    expected, actual, start = [], [], 0
    for size in sizes:
        batch = samples[start : start + size]
        if not len(batch):
            break
        expected.append(model(batch).float())
        actual.append(run(batch).float())
        start += size
    wanted, found = torch.cat(expected), torch.cat(actual)
    same = wanted[3:].argmax(1) == found[3:].argmax(1)
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    return Checked(difference=difference, agreement=float(same.float().mean()), images=len(same))
