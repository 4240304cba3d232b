"""Sections of scripts/gpu_suite.sh, each in a separate process, so that a crash does not end the others."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import Shape, kernel_rows, kernels_of
from gpu_report import write_gpu_report

from vim.benchmarking.models import Mode, measure_case
from vim.ops import unavailable_backends
from vim.runtime.gpu import captured, describe_gpu, probe_gpu, time_calls
from vim.runtime.machine import describe_machine

ROOT = Path(__file__).parents[1]
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# Seconds reserved for the sections after the models.
AFTER_MODELS = 110
NO_GPU = "no GPU"

MODELS = {"Ti": "tiny", "S": "small", "B": "base"}
LARGE = {"Ti": 128, "S": 128, "B": 64}  # images of 224 pixels; of larger ones, as many as give as many tokens
SHAPES = [
    Shape(name="Ti 224 b64", batch=64, len=197, d_model=192),
    Shape(name="Ti 1248 b1", batch=1, len=6085, d_model=192),
    Shape(name="Ti 224 b1", batch=1, len=197, d_model=192),
    Shape(name="S 224 b64", batch=64, len=197, d_model=384),
    Shape(name="B 224 b64", batch=64, len=197, d_model=768),
    Shape(name="Ti 2048 b2", batch=2, len=16385, d_model=192),
]
REHEARSAL = Shape(name="rehearsal", batch=1, len=5, d_model=16)


class Section:
    """Results of one section, saved after every step."""

    def __init__(self, path: Path, deadline: float) -> None:
        self.path, self.deadline = path, deadline
        self.record: dict[str, Any] = {"rows": [], "not_run": []}

    def row(self, **row: Any) -> None:
        """Add a result."""
        self.record["rows"].append(row)
        self.write()

    def not_run(self, what: str, why: str) -> None:
        """Add a step that failed or was skipped, and the reason."""
        self.record["not_run"].append(f"{what}: {why}")
        self.write()

    def seconds_left(self) -> float:
        """Return the seconds until the deadline of the section."""
        return self.deadline - time.time()

    def write(self) -> None:
        """Save all results so far."""
        self.path.write_text(json.dumps(self.record, indent=1) + "\n")


# ---- sections ----------------------------------------------------------------------------------------------------


def build(section: Section) -> None:
    """Build the CPU library and, with nvcc, the CUDA library."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "vim.build", "--cuda"], capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).strip().splitlines()
    section.row(step="build", ok=done.returncode == 0, seconds=round(time.monotonic() - start, 1), said=lines[-3:])
    report = subprocess.run([sys.executable, "-m", "vim.doctor"], capture_output=True, text=True, check=False)
    section.row(step="doctor", ok=report.returncode == 0, said=report.stdout.splitlines())


def parity(section: Section) -> None:
    """Run tests/gpu: every backend against the reference, and everything else that needs a GPU."""
    if importlib.util.find_spec("pytest") is None:
        section.not_run("tests/gpu", "pytest is not installed")
        return
    report = section.path.with_suffix(".xml")
    settings = ["-o", "addopts=-ra --strict-markers", "-p", "no:cacheprovider", f"--junitxml={report}"]
    files = ["tests/gpu/test_parity.py", "tests/gpu/test_behaviour.py"]
    start = time.monotonic()
    tests = subprocess.Popen([sys.executable, "-m", "pytest", "-q", *settings, *files], cwd=ROOT)
    try:
        tests.wait(max(1.0, section.seconds_left() - 10))
    except subprocess.TimeoutExpired:
        section.not_run("some of tests/gpu", "the time was over")
        tests.send_signal(signal.SIGINT)  # pytest then reports the finished tests
        tests.wait(15)
    if not report.exists():
        section.row(step="tests/gpu", ok=False, said=["pytest wrote no report"])
        return
    suite = next(xml.etree.ElementTree.parse(report).iter("testsuite"))
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}: {(problem.get('message') or '').splitlines()[:1]}"
        for case in suite.iter("testcase")
        for problem in [*case.findall("failure"), *case.findall("error")]
    ]
    ok = counts["failures"] == counts["errors"] == 0 and (counts["skipped"] == 0 or not GPU)
    section.row(step="tests/gpu", ok=ok, seconds=round(time.monotonic() - start, 1), **counts, failed=failed)
    if not GPU:
        section.not_run("tests/gpu", f"{counts['skipped']} of {counts['tests']} tests need a GPU")


def kernels(section: Section) -> None:
    """Measure each op alone."""
    if not GPU:
        for kernel in kernels_of(REHEARSAL, torch.float32, "cpu"):
            kernel.make(None)()
            section.row(step="rehearsal on the processor", op=kernel.op, bytes=kernel.bytes, special=kernel.special)
        for shape in SHAPES:
            section.not_run(f"kernels of {shape.name}", NO_GPU)
        return
    gpu = describe_gpu()
    section.record["probe"] = probe = probe_gpu()
    for shape in SHAPES:
        if section.seconds_left() < 5:
            section.not_run(f"kernels of {shape.name}", "the time was over")
            continue
        dtypes = [torch.bfloat16, torch.float32] if shape is SHAPES[0] else [torch.bfloat16]
        for row in kernel_rows([shape], dtypes, probe, gpu):
            section.row(**row)


def cases() -> Iterator[tuple[str, int, int, str, Mode]]:
    """Yield (model, pixels, images or 0 for many, dtype, mode), the most important first."""
    sizes = (224, 1248, 512, 1024, 1600, 2048)
    for model in MODELS:
        yield from ((model, size, 0, "bfloat16", "inference") for size in sizes)
        yield from ((model, size, 1, "bfloat16", "inference") for size in (224, 1248))
        yield from ((model, size, 0, "bfloat16", "training") for size in (224, 1248))
    for model in MODELS:
        yield from ((model, size, 1, "bfloat16", "inference") for size in (512, 1024, 1600, 2048))
        yield from ((model, size, 0, "bfloat16", "training") for size in (512, 1024, 1600, 2048))
    for model in MODELS:
        for mode in ("inference", "training"):
            yield from ((model, size, 0, "float32", mode) for size in sizes)
        yield from ((model, size, 1, "float32", "inference") for size in sizes)


def rivals(model: str, size: int, batch: int, mode: Mode) -> list[str]:
    """Return the models and variants to compare with our native kernels."""
    ours, deit = (f"{kind}_{MODELS[model]}_patch16_224" for kind in ("vim", "deit"))
    specs = [ours, deit, f"{deit}:math"]
    missing = unavailable_backends("bidirectional_scan", DEVICE, torch.bfloat16) if GPU else {}
    specs += [f"{ours}:{backend}" for backend in ("triton", "mamba_ssm") if GPU and backend not in missing]
    if batch == 1 and mode == "inference" and GPU:
        specs += [f"{ours}:graph", f"{deit}:graph"]
    if model == "Ti" and size == 224:
        specs.append(f"{ours}:reference")
    return specs


def models(section: Section) -> None:
    """Compare whole models with timm's, the most important cases first."""
    if not GPU:
        for mode in ("inference", "training"):
            rows, failed = measure_case(rivals("Ti", 224, 1, mode), 32, 1, "float32", mode, DEVICE, 1, 1)
            assert not failed, failed
            for row in rows:
                section.row(step="rehearsal on the processor", **asdict(row))
    # A model that is slow at a small size is skipped from then on.
    slow: set[str] = set()
    for model, size, batch, dtype, mode in cases():
        images = batch or max(1, round(LARGE[model] * (224 / size) ** 2))
        what = f"Vim-{model} {size}px b{images} {dtype} {mode}"
        if not GPU:
            section.not_run(what, NO_GPU)
        elif section.seconds_left() < 6:
            section.not_run(what, "the time was over")
        else:
            specs = [spec for spec in rivals(model, size, batch, mode) if spec not in slow]
            rows, failed = measure_case(specs, size, images, dtype, mode, DEVICE, 10, 0.4 * len(specs))
            torch.cuda.empty_cache()
            for row in rows:
                section.row(**asdict(row))
            for spec, reason in failed.items():
                section.not_run(f"{spec} {size}px b{images} {dtype} {mode}", reason)
            slow |= {row.model for row in rows if row.seconds_median > 1.0}


def training(section: Section) -> None:
    """Train Vim-Ti for a hundred steps at a global batch of 1024, accumulated, in bfloat16 with TF32 for the rest."""
    import timm

    size, micro, accumulate, steps = (224, 256, 4, 100) if GPU else (32, 2, 2, 2)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(0)
    with DEVICE:
        model = timm.create_model("vim_tiny_patch16_224", img_size=size, drop_path_rate=0.1).train()
        images = torch.randn(micro, 3, size, size)
        labels = torch.randint(1000, (micro,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=GPU)
    losses, done, start = [], 0, time.perf_counter()
    for step in range(steps):
        if step == 5:  # the first steps build and tune, and do not count
            _wait()
            start = time.perf_counter()
        if section.seconds_left() < 8:
            section.not_run(f"training steps {step} to {steps}", "the time was over")
            break
        for _ in range(accumulate):
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(model(images).float(), labels) / accumulate
            loss.backward()
            losses.append(loss.detach() * accumulate)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
    _wait()
    seconds = time.perf_counter() - start
    values = torch.stack(losses)
    section.row(
        step="training" if GPU else "rehearsal on the processor",
        steps=done,
        global_batch=micro * accumulate,
        images_per_second=round((done - 5) * micro * accumulate / seconds) if done > 5 else None,
        peak_mebibytes=round(torch.cuda.max_memory_allocated() / 2**20) if GPU else None,
        not_finite=int((~values.isfinite()).sum()),
        first_loss=round(values[0].item(), 4),
        last_loss=round(values[-1].item(), 4),
    )
    if not GPU:
        section.not_run("100 steps of Vim-Ti at a global batch of 1024", NO_GPU)


def latency(section: Section) -> None:
    """Measure one image: eagerly, as a CUDA graph, and the time in kernels alone."""
    import timm

    for name, size in MODELS.items():
        what = f"latency of Vim-{name} at 224px"
        if not GPU:
            section.not_run(what, NO_GPU)
            continue
        if section.seconds_left() < 8:
            section.not_run(what, "the time was over")
            continue
        with DEVICE:
            model = timm.create_model(f"vim_{size}_patch16_224").eval().to(torch.bfloat16)
            image = torch.randn(1, 3, 224, 224, dtype=torch.bfloat16)
        call = partial(model, image)
        with torch.no_grad():
            eager = time_calls([call], repeats=20)
            graph = time_calls([captured([call], torch.cuda.Stream())], repeats=50)
            in_kernels, launches = _kernel_time(call)
        section.row(
            step="latency",
            model=f"Vim-{name} 224px b1 bfloat16",
            eager_ms=round(1e3 * eager, 3),
            graph_ms=round(1e3 * graph, 3),
            kernels_ms=round(1e3 * in_kernels, 3),
            launches=launches,
        )


def _kernel_time(call: Callable[[], object]) -> tuple[float, int]:
    """Return the seconds in kernels of one call, and the number of kernels."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
        call()
        torch.cuda.synchronize()
    events = [e for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(e.device_time for e in events) / 1e6, len(events)


def _wait() -> None:
    if GPU:
        torch.cuda.synchronize()


# Each section with its time limit in seconds.
SECTIONS: dict[str, tuple[Callable[[Section], None], float]] = {
    "build": (build, 200.0),
    "parity": (parity, 190.0),
    "kernels": (kernels, 50.0),
    "models": (models, 400.0),
    "training": (training, 70.0),
    "latency": (latency, 40.0),
}


# ---- main --------------------------------------------------------------------------------------------------------


def main() -> int:
    """Run the sections and write the report; return 1 if something failed, else 0."""
    parser = argparse.ArgumentParser(prog="scripts/gpu_suite.sh", description=__doc__)
    parser.add_argument("--seconds", type=float, default=520.0, help="time for everything")
    parser.add_argument("--output", default="", help="path of the results without a suffix")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.section:
        SECTIONS[options.section][0](Section(options.record, options.deadline))
        return 0
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-") if GPU else "rehearsal"
    output = ROOT / (options.output or f"benchmarks/results/gpu-{name}")
    output.parent.mkdir(parents=True, exist_ok=True)
    start = time.time()
    record: dict[str, Any] = {
        "command": " ".join(["scripts/gpu_suite.sh", *sys.argv[1:]]),
        "gpu": GPU,
        "machine": describe_machine(),
        "sections": {},
    }
    for section in options.sections:
        # A rehearsal gets more time: few processors compile for minutes.
        record["sections"][section] = _run(section, start + (options.seconds if GPU else 3600), output)
        record["seconds"] = round(time.time() - start, 1)
        write_gpu_report(record, output)
    steps = [row for part in record["sections"].values() for row in part["rows"]]
    ok = all(row.get("ok", True) for row in steps) and not any(part["died"] for part in record["sections"].values())
    print(f"{output}.md, {output}.json: {'everything that ran is right' if ok else 'something went wrong'}")
    return 0 if ok else 1


def _run(section: str, deadline: float, output: Path) -> dict[str, Any]:
    """Run one section in a separate process."""
    print(f"== {section}", flush=True)
    limit = deadline
    if GPU:
        limit = min(deadline - (AFTER_MODELS if section == "models" else 0), time.time() + SECTIONS[section][1])
    path = output.with_name(f"{output.name}-{section}.part.json")
    path.write_text(json.dumps({"rows": [], "not_run": []}))
    command = [sys.executable, __file__, "--section", section, "--deadline", str(limit), "--record", str(path)]
    start, died = time.time(), ""
    try:
        # Sections stop at their deadline; one that hangs is killed a little later.
        done = subprocess.run(command, cwd=ROOT, timeout=max(5.0, limit - time.time() + 20), check=False)
        died = "" if done.returncode == 0 else f"ended with {done.returncode}"
    except subprocess.TimeoutExpired:
        died = "took too long and was ended"
    record = json.loads(path.read_text())
    path.unlink()
    path.with_suffix(".xml").unlink(missing_ok=True)
    return {**record, "seconds": round(time.time() - start, 1), "died": died}


if __name__ == "__main__":
    sys.exit(main())
