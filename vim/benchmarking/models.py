"""Benchmark of models: images per second and memory, interleaved in one process, with medians and quartiles."""

from __future__ import annotations

import contextlib
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
from timm.layers import set_fused_attn
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import vim.models  # noqa: F401  (registers our models with timm)
from vim.benchmarking.measuring import PeakMemory, keep_freed_memory, probe_machine
from vim.benchmarking.options import Mode
from vim.benchmarking.report import write_report
from vim.models.build import create_named
from vim.ops import default_backend
from vim.runtime.gpu import time_calls
from vim.runtime.graphed import graphed
from vim.runtime.machine import describe_machine

_logger = logging.getLogger(__name__)

# Variants of a model, written after its name: "deit_tiny_patch16_224:frozen".
VARIANTS = {
    "": "as shipped",
    "frozen": "torch.compile with the weights frozen into the graph (inference only): packed products for every model",
    "compiled": "torch.compile",
    "modules": "our models by the modules of their layers, as under hooks, with PyTorch's products",
    "reference": "our models on the reference backend",
    "triton": "our models on the Triton backend",
    "mamba_ssm": "our models on the kernels of mamba-ssm",
    "math": "timm's models with attention that is not fused",
    "graph": "as a CUDA graph (inference only)",
}
_BACKENDS = ("reference", "triton", "mamba_ssm")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measurement. Times are seconds a call, of one batch; memory is beyond the model's own."""

    model: str
    size: int
    batch: int
    dtype: str
    mode: str
    rounds: int
    seconds_median: float
    seconds_min: float
    seconds_quartiles: tuple[float, float]
    images_per_second: float
    peak_mebibytes: float | None


def compare_models(
    models: list[str],
    sizes: list[int],
    batches: list[int],
    dtypes: list[str],
    modes: list[Mode],
    device: str,
    threads: int,
    rounds: int,
    seconds: float,
    output: str,
) -> None:
    """Measure models and print a table; `run_benchmark` describes the arguments."""
    _check(models, dtypes, device, rounds)
    if threads:
        torch.set_num_threads(threads)
    machine, rows, probes = describe_machine(), [], [probe_machine(device)]
    failures: list[str] = []
    machine["freed_memory"] = (
        "kept in the process, for all models alike" if keep_freed_memory() else "as the system does"
    )
    cases = [(mode, dtype, batch, size) for mode in modes for dtype in dtypes for batch in batches for size in sizes]
    for number, (mode, dtype, batch, size) in enumerate(cases, 1):
        _logger.info("case %d of %d: %s %s, batch %d, %d px", number, len(cases), mode, dtype, batch, size)
        measured, failed = measure_case(models, size, batch, dtype, mode, torch.device(device), rounds, seconds)
        rows += measured
        failures += [f"{mode} {dtype} b{batch} {size}px: {spec}: {reason}" for spec, reason in failed.items()]
        probes.append(probe_machine(device))
    record = {
        "command": " ".join(["python -m vim.benchmark", *sys.argv[1:]]),
        "machine": machine,
        "probes": probes,
        "variants": {spec: VARIANTS[spec.partition(":")[2]] for spec in models},
        "rows": [asdict(row) for row in rows],
        "failures": failures,
    }
    sys.stdout.write(write_report(record, output) + "\n")


def _check(specs: list[str], dtypes: list[str], device: str, rounds: int) -> None:
    for spec in specs:
        name, _, variant = spec.partition(":")
        if not timm.is_model(name):
            raise ValueError(f"models: timm knows no model {name!r}")
        if variant not in VARIANTS:
            raise ValueError(f"models: the variant of {spec!r} must be one of {sorted(filter(None, VARIANTS))}")
    unknown = sorted(set(dtypes) - set(_DTYPES))
    if unknown:
        raise ValueError(f"dtypes must be among {sorted(_DTYPES)}, got {unknown}")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device is 'cuda', but PyTorch finds no GPU")
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}")


# Seconds. OpenMP's threads spin for milliseconds after another model's call, so a short call is timed after an untimed
# one of the same model, as in a process of its own.
_SHORT = 0.1


def measure_case(
    specs: list[str],
    size: int,
    batch: int,
    dtype: str,
    mode: Mode,
    device: torch.device,
    rounds: int,
    seconds: float,
) -> tuple[list[Row], dict[str, str]]:
    """Run the models in turn, so that other load on the machine affects all of them alike.

    A call of less than 0.1 s is timed after an untimed call of the same model: threads of the model before it may spin.

    Returns:
        A row for each model that ran, and the reason for each that could not, such as too little memory.
    """
    calls, memory, failed = {}, {}, {}
    for spec in specs:
        try:
            calls[spec] = make_call(spec, size, batch, _DTYPES[dtype], mode, device)
            calls[spec]()
            memory[spec] = _peak_memory(calls[spec], device)
        except Exception as error:  # too little memory, no such backend, or what a compiler raises
            calls.pop(spec, None)
            failed[spec] = next(iter(str(error).splitlines()), type(error).__name__)
            _logger.warning("%s does not run: %s", spec, failed[spec])
    times: dict[str, list[float]] = {spec: [] for spec in calls}
    deadline = time.perf_counter() + seconds
    for done in range(rounds):
        if done >= 3 and time.perf_counter() > deadline:
            break
        for spec, call in calls.items():
            if not times[spec] or times[spec][-1] < _SHORT:
                call()
            times[spec].append(_time(call, device))
    return [_row(spec, size, batch, dtype, mode, times[spec], memory[spec]) for spec in calls], failed


def _peak_memory(call: Callable[[], None], device: torch.device) -> float | None:
    """Return the median of the peaks of three calls, in MiB: on a CPU the gaps of the heap differ from call to call."""
    peaks = []
    for _ in range(3):
        with PeakMemory(device) as peak:
            call()
        if peak.mebibytes is None:
            return None
        peaks.append(peak.mebibytes)
    return statistics.median(peaks)


def _time(call: Callable[[], None], device: torch.device) -> float:
    """Return the seconds of one call; on a GPU, between two events around its kernels."""
    if device.type == "cuda":
        return time_calls([call], repeats=1, warm=False)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _row(spec: str, size: int, batch: int, dtype: str, mode: str, times: list[float], memory: float | None) -> Row:
    median = statistics.median(times)
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [median] * 3
    return Row(
        model=spec,
        size=size,
        batch=batch,
        dtype=dtype,
        mode=mode,
        rounds=len(times),
        seconds_median=median,
        seconds_min=min(times),
        seconds_quartiles=(quartiles[0], quartiles[2]),
        images_per_second=batch / median,
        peak_mebibytes=memory,
    )


def make_call(
    spec: str, size: int, batch: int, dtype: torch.dtype, mode: Mode, device: torch.device
) -> Callable[[], None]:
    """Return a function that runs one batch through a model."""
    name, _, variant = spec.partition(":")
    torch.manual_seed(0)
    set_fused_attn(variant != "math")
    with device:
        model = create_named(name, img_size=size, drop_path_rate=0.0)
    set_fused_attn(True)
    images = torch.randn(batch, 3, size, size, device=device)
    if mode == "inference":
        model, images = model.to(dtype).eval(), images.to(dtype)
    run = _prepare(model, variant, images)

    def infer() -> None:
        # Frozen weights may not be used in inference mode.
        with torch.no_grad() if variant == "frozen" else torch.inference_mode(), _settings(variant):
            run(images)

    def train() -> None:
        with _settings(variant):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = run(images).float().square().mean()
            loss.backward()
        model.zero_grad(set_to_none=True)

    return infer if mode == "inference" else train


def _prepare(model: nn.Module, variant: str, images: torch.Tensor) -> Callable[..., Any]:
    if variant == "compiled":
        return torch.compile(model)
    if variant == "frozen":
        return torch.compile(model, options={"freezing": True})
    if variant == "graph":
        return graphed(model, images)
    return model


@contextlib.contextmanager
def _settings(variant: str) -> Iterator[None]:
    """Apply the settings of a variant for the time of a call."""
    if variant == "modules":
        # With a hook, each module of a layer is called on its own.
        hook = register_module_forward_hook(lambda *_: None)
        try:
            yield
        finally:
            hook.remove()
    elif variant in _BACKENDS:
        with default_backend(variant):
            yield
    else:
        yield
