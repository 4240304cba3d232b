"""Measure UPerNet on Vim-Ti and on DeiT-Ti, in interleaved rounds.

    python scripts/benchmark_dense.py [--size 512] [--batch 1] [--threads N] [--seconds 60]

Both have the same pyramid and head for 150 classes; they differ in the backbone. Vim's levels are after blocks 5, 11,
17 and 23, as in the original, and DeiT's after blocks 2, 5, 8 and 11. Weights are random, and images too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

import vim  # noqa: F401  (registers our models with timm)
from vim.benchmarking.measuring import keep_freed_memory
from vim.models.segmentation import Segmenter
from vim.runtime.machine import describe_machine

_CLASSES = 150
_VIM_BLOCKS, _DEIT_BLOCKS = (5, 11, 17, 23), (2, 5, 8, 11)


class DeitPyramid(nn.Module):
    """DeiT's maps after four blocks, at the resolutions of a pyramid.

    Args:
        size: Side of the images in pixels.
        resize: The layers of another pyramid of the same width.
    """

    def __init__(self, size: int, resize: nn.ModuleList) -> None:
        super().__init__()
        self.model = timm.create_model(
            "deit_tiny_patch16_224", features_only=True, out_indices=_DEIT_BLOCKS, img_size=size
        )
        self.resize = resize

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps, finest first."""
        return [resize(level) for resize, level in zip(self.resize, self.model(images), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=1, help="images in a call")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads; 0 is its own choice")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for all rounds, at least 3")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    print(f"{describe_machine()['cpu']}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, ", end="")
    print(f"load {os.getloadavg()[0]:.1f} before; {options.size} px, batch {options.batch}, float32\n", flush=True)
    models = {"Vim-Ti": _make_vim(options.size), "DeiT-Ti": _make_deit(options.size)}
    images = torch.randn(options.batch, 3, options.size, options.size)
    times = _measure({name: lambda model=model: model(images) for name, model in models.items()}, options.seconds)
    print("| UPerNet on | million parameters | rounds | median, ms | quartiles | images/s | speed, of Vim-Ti's |")
    print("|---|---|---|---|---|---|---|")
    vim_median = statistics.median(times["Vim-Ti"])
    for name, taken in times.items():
        low, median, high = statistics.quantiles(taken, n=4)
        millions = sum(parameter.numel() for parameter in models[name].parameters()) / 1e6
        figures = f"{millions:.2f} | {len(taken)} | {1e3 * median:.0f} | {1e3 * low:.0f} to {1e3 * high:.0f}"
        print(f"| {name} | {figures} | {options.batch / median:.2f} | {vim_median / median:.2f} |")
    print(f"\nload {os.getloadavg()[0]:.1f} after")


def _make_vim(size: int) -> Segmenter:
    backbone = timm.create_model("vim_tiny_patch16_224", img_size=size, cls_position="none")
    return Segmenter(backbone, _CLASSES, _VIM_BLOCKS, tap="mixer", aux_channels=None).eval()


def _make_deit(size: int) -> Segmenter:
    segmenter = _make_vim(size)
    segmenter.backbone = DeitPyramid(size, segmenter.backbone.resize)
    return segmenter.eval()


@torch.inference_mode()
def _measure(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Return the seconds of each call; every round has an untimed and a timed call of each model."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds
    while len(times["Vim-Ti"]) < 3 or time.perf_counter() < deadline:
        for name, call in calls.items():
            call()  # the threads of the model before it may spin, and the caches hold its weights
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
