"""Measure exported models beside PyTorch and DeiT: batch 1, interleaved calls in one process, medians.

    for form in onnx onnx-unrolled; do
        python -m vim.export vim_tiny_patch16_224 exports/vim-$form.onnx --format $form
    done
    python scripts/benchmark_exports.py exports/*

The eager models have random weights, on which the time does not depend. Each row has the name of its file.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import timm
import torch

import vim  # noqa: F401  (registers our models)
from vim.benchmarking.measuring import probe_machine
from vim.inference.export_formats import FORMATS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="files that vim.export wrote")
    parser.add_argument("--models", nargs="*", default=["vim_tiny_patch16_224", "deit_tiny_patch16_224"])
    parser.add_argument("--size", type=int, default=224, help="side of the images, in pixels")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    by_suffix = {kind.suffix: kind for kind in FORMATS.values()}
    files = [path for path in options.files if path.suffix in by_suffix]
    calls = {f"{name}, eager": timm.create_model(name, img_size=options.size).eval() for name in options.models}
    calls |= {path.name: by_suffix[path.suffix].open(path) for path in files}
    images = torch.randn(1, 3, options.size, options.size)
    times: dict[str, list[float]] = {name: [] for name in calls}
    print(probe_machine())
    with torch.inference_mode():
        for _ in range(options.rounds):
            for name, call in calls.items():
                call(images)  # threads of the runtime before it may still spin
                start = time.perf_counter()
                call(images)
                times[name].append(1e3 * (time.perf_counter() - start))
    print("| model | ms, median | quartiles | fastest |\n|---|---|---|---|")
    for name, found in times.items():
        low, middle, high = statistics.quantiles(found, n=4)
        print(f"| {name} | {middle:.1f} | {low:.1f} to {high:.1f} | {min(found):.1f} |")


if __name__ == "__main__":
    main()
