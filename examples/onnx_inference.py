"""Classify images with an exported model: onnxruntime, NumPy and Pillow, and no PyTorch.

    pip install "vimamba[export]"
    python -m vim.export runs/RUN vim.onnx          # or the name of a model; see docs/export.md
    python examples/onnx_inference.py vim.onnx IMAGE...

The preparation of an image is that of the ImageNet models; a run's own is in the `data` part of its `config.yaml`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)


def prepare(path: str, side: int, crop_pct: float = 0.875) -> np.ndarray:
    """Return an image as the model takes it, (3, side, side): shorter side resized, centre cropped, normalised."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file).convert("RGB")
    scale = int(side / crop_pct) / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    pixels = np.asarray(image.crop((left, top, left + side, top + side)), dtype=np.float32) / 255
    return ((pixels - MEAN) / STD).transpose(2, 0, 1)


def classify(model: str, paths: Sequence[str]) -> np.ndarray:
    """Return the probabilities of the classes, (images, classes)."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()
    channels, side = images.shape[1], images.shape[-1]
    if channels != 3:
        raise SystemExit(f"{model} takes images of {channels} channels; this example prepares RGB")
    dtype = np.float16 if "float16" in images.type else np.float32
    batch = np.stack([prepare(path, side) for path in paths]).astype(dtype)
    (logits,) = session.run(None, {images.name: batch})
    exponentials = np.exp(logits.astype(np.float32) - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="file that vim.export wrote")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--top", type=int, default=5, help="classes to print")
    args = parser.parse_args(argv)
    for path, probabilities in zip(args.images, classify(args.model, args.images), strict=True):
        best = np.argsort(-probabilities)[: args.top]
        print(path, *(f"class {index}: {100 * probabilities[index]:.1f} %" for index in best), sep="  ")


if __name__ == "__main__":
    main()
