#!/usr/bin/env python3
"""What explanations cost on a CPU: seconds an image for each method of `vim.explain`, and the process's peak memory.

    python scripts/explain_cost.py [--model vim_tiny_patch16_224] [--repeats 3] [--methods gradcam saliency ...]

Each method is called once untimed, then `--repeats` times, each on another image; the median is printed. The sum is
what one image costs with all methods. Attention and rollout come from the same matrices, so they are one line. Weights
are random, which changes no time. Run it on a quiet machine.
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor

import vim  # noqa: F401  registers the models
from vim.explain import attention_rollout, class_activation, hidden_attention, pixel_gradients, receptive_field
from vim.explain.class_activation import METHODS
from vim.explain.pixel_gradients import PIXEL_METHODS

TARGET = 3  # any class


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vim_tiny_patch16_224", metavar="NAME")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="default: all, and the receptive field")
    options = parser.parse_args()
    torch.manual_seed(0)
    model: Any = timm.create_model(options.model).eval()
    shape = (1, model.in_chans, *model.patch_embed.img_size)
    calls = {
        "attention and rollout": lambda x: attention_rollout(hidden_attention(model, x, absolute=True)),
        **{name: lambda x, name=name: class_activation(model, x, TARGET, name) for name in METHODS},
        **{name: lambda x, name=name: pixel_gradients(model, x, TARGET, name) for name in PIXEL_METHODS},
        "receptive field": lambda x: receptive_field(model, x, "class" if model.num_prefix_tokens else "center"),
    }
    chosen = calls if options.methods is None else {name: calls[name] for name in options.methods}
    print(f"{options.model}, {torch.get_num_threads()} threads; {memory():.2f} GiB with the model")
    total = 0.0
    for name, call in chosen.items():
        seconds = measure(call, shape, options.repeats)
        total += seconds
        print(f"{name:24} {seconds:8.2f} s an image   peak so far {memory():.2f} GiB", flush=True)
    print(f"{'all of them':24} {total:8.2f} s an image   peak        {memory():.2f} GiB")


def measure(call: Callable[[Tensor], Any], shape: tuple[int, ...], repeats: int) -> float:
    """Return the median time of a call in seconds."""
    call(torch.randn(shape))
    times = []
    for _ in range(repeats):
        image = torch.randn(shape)
        began = time.perf_counter()
        call(image)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def memory() -> float:
    """Return the largest memory of this process so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, on macOS in bytes
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


if __name__ == "__main__":
    main()
