"""Whole models beside timm's: throughput, training steps, peak memory, and the latency of one image."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

from scripts.gpu.record import Row, Section

MODELS = {"Ti": "tiny", "S": "small", "B": "base"}
LARGE = {"Ti": 128, "S": 128, "B": 64}  # images of 224 pixels; of larger ones, as many as give as many tokens
# (model, pixels, mode), the most valuable first.
CASES = [
    *((model, 224, "inference") for model in MODELS),
    ("Ti", 1248, "inference"),
    ("Ti", 224, "training"),
    ("S", 224, "training"),
    ("Ti", 1248, "training"),
    ("S", 1248, "inference"),
    ("B", 1248, "inference"),
    ("B", 224, "training"),
    ("S", 1248, "training"),
    ("B", 1248, "training"),
]
REMAINING = [
    (model, size, mode) for model in MODELS for size in (512, 1600, 1024, 2048) for mode in ("inference", "training")
]


def models(section: Section) -> None:
    """Compare whole models in bfloat16 at 224 and 1248 pixels: eager, as a graph, and DeiT with and without flash."""
    for model, size, mode in CASES:
        _case(section, model, size, mode)


def sizes(section: Section) -> None:
    """Compare the models at the other sizes, Vim-Ti first."""
    for model, size, mode in REMAINING:
        _case(section, model, size, mode)


def _case(section: Section, model: str, size: int, mode: str) -> None:
    """Run one case; without a GPU, the first of each mode on a small image."""
    images = max(1, round(LARGE[model] * (224 / size) ** 2))
    what = f"Vim-{model} {size}px b{images} {mode}"
    small = (model, size) == ("Ti", 224)
    specs = rivals(model, mode)
    rehearsal = partial(_measure, [s for s in specs if not s.endswith(":graph")], 32, 1, "float32", mode, 1, 0.0)
    action = partial(_measure, specs, size, images, "bfloat16", mode, 10, 2.0)
    section.run(what, 6.0, action, rehearsal if small else None)


def rivals(model: str, mode: str) -> list[str]:
    """Return the models and variants to compare; the first is what the others are compared with."""
    ours, deit = (f"{kind}_{MODELS[model]}_patch16_224" for kind in ("vim", "deit"))
    if mode == "training":
        return [ours, deit, f"{deit}:math"]
    # A capture that fails can spoil what comes after it in the process.
    return [ours, deit, f"{deit}:math", f"{ours}:graph", f"{deit}:graph"]


def _measure(
    specs: list[str], size: int, images: int, dtype: str, mode: str, rounds: int, seconds: float
) -> Iterator[Row]:
    import torch

    from vim.benchmarking.models import measure_case

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, failed = measure_case(specs, size, images, dtype, mode, device, rounds, seconds)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        yield from ({"step": "rehearsal on the processor", **asdict(row)} for row in rows)
        rows = []
    yield from (asdict(row) for row in rows)
    for spec, why in failed.items():
        yield {"model": spec, "case": f"{mode} b{images} {size}px", "ok": False, "why": why}


def training(section: Section) -> None:
    """Train Vim-Ti for a hundred steps at a global batch of 1024, accumulated, in bfloat16 with TF32 for the rest."""
    full = partial(_train, section, 224, 256, 4, 100)
    section.run("100 steps of Vim-Ti at a global batch of 1024", 25.0, full, partial(_train, section, 32, 2, 2, 2))


def _train(section: Section, size: int, micro: int, accumulate: int, steps: int) -> Iterator[Row]:
    import timm
    import torch

    import vim.models  # noqa: F401  registers the models

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    wait: Callable[[], None] = torch.cuda.synchronize if gpu else lambda: None
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(0)
    with device:
        model = timm.create_model("vim_tiny_patch16_224", img_size=size, drop_path_rate=0.1).train()
        images = torch.randn(micro, 3, size, size)
        labels = torch.randint(1000, (micro,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=gpu)
    losses, done, uncounted, start = [], 0, min(5, steps - 1), time.perf_counter()
    for step in range(steps):
        if step == uncounted:  # the first steps build and tune
            wait()
            start = time.perf_counter()
        if section.seconds_left() < 3:
            break
        for _ in range(accumulate):
            with torch.autocast(device.type, torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(model(images).float(), labels) / accumulate
            loss.backward()
            losses.append(loss.detach() * accumulate)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if step % 10 == 9:
            wait()  # so that the time that is left is known
    wait()
    seconds = time.perf_counter() - start
    values = torch.stack(losses)
    unfinished = int((~values.isfinite()).sum())
    yield {
        "step": "training" if gpu else "rehearsal on the processor",
        "ok": unfinished == 0 and (not gpu or values[-1].item() < values[0].item()),
        "steps": done,
        "global_batch": micro * accumulate,
        "images_per_second": round((done - uncounted) * micro * accumulate / seconds) if done > uncounted else None,
        "peak_mebibytes": round(torch.cuda.max_memory_allocated() / 2**20) if gpu else None,
        "not_finite": unfinished,
        "first_loss": round(values[0].item(), 4),
        "last_loss": round(values[-1].item(), 4),
    }


def latency(section: Section) -> None:
    """Measure one image: eagerly, as a CUDA graph, and the time in kernels alone."""
    for (name, size), kind in itertools.product(MODELS.items(), ("vim", "deit")):
        section.run(f"latency of {kind} {name} at 224px", 2.5, partial(_latency, f"{kind}_{size}_patch16_224"))


def _latency(name: str) -> Iterator[Row]:
    import timm
    import torch

    import vim.models
    from vim.runtime.gpu import time_calls

    with torch.device("cuda"):
        model = timm.create_model(name).eval().to(torch.bfloat16)
        image = torch.randn(1, 3, 224, 224, dtype=torch.bfloat16)
    call = partial(model, image)
    with torch.no_grad():
        eager = time_calls([call], repeats=30)
        graph = time_calls([partial(vim.graphed(model, image), image)], repeats=50)
    model_and_batch = f"{name} b1 bfloat16"
    yield {"model": model_and_batch, "eager_ms": round(1e3 * eager, 3), "graph_ms": round(1e3 * graph, 3)}
    with torch.no_grad():
        in_kernels, launches = _kernel_time(call)
    yield {"model": model_and_batch, "kernels_ms": round(1e3 * in_kernels, 3), "launches": launches}


def _kernel_time(call: Callable[[], object]) -> tuple[float, int]:
    """Return the seconds in kernels of one call, and the number of kernels."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
        call()
        torch.cuda.synchronize()
    events = [e for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(e.device_time for e in events) / 1e6, len(events)
