"""Measure models on a busy machine.

    python scripts/benchmark_busy.py [--busy 0 1 2] [--threads 2 1] [--seconds 5] [--cases CASE ...]

A case is model:size:batch:dtype:mode, with any model of timm. Cases of the same size, batch, dtype and mode are
measured together, with every number of threads in turn. Meanwhile `--busy` processes spin, each on one processor.
The state of a busy machine lasts for seconds, so the mean and the worst time count as well as the median.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch

from vim.benchmarking.measuring import keep_freed_memory
from vim.benchmarking.models import make_call
from vim.runtime.machine import describe_machine

_SHAPES = (
    "224:1:float32:inference",
    "224:8:float32:inference",
    "224:1:bfloat16:inference",
    "512:1:float32:inference",
    "224:8:float32:training",
)
_MODELS = ("vim_tiny_patch16_224", "deit_tiny_patch16_224")
_CASES = tuple(f"{model}:{shape}" for shape in _SHAPES for model in _MODELS)
# Ends when its parent process ends.
_LOOP = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): sum(range(100_000))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2], help="numbers of spinning processes")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1], help="torch's numbers of threads")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for a case, a number of threads and a load")
    parser.add_argument("--cases", nargs="+", default=list(_CASES), metavar="CASE", help="model:size:batch:dtype:mode")
    options = parser.parse_args()
    malformed = [case for case in options.cases if case.count(":") != 4]
    if malformed:
        parser.error(f"a case is model:size:batch:dtype:mode, got {malformed}")
    keep_freed_memory()
    processors = sorted(os.sched_getaffinity(0))
    print(f"{describe_machine()['cpu']}, {len(processors)} processors, PyTorch {torch.__version__}, ", end="")
    print(f"load {os.getloadavg()[0]:.1f} before; times in ms\n")
    print("| case | busy | threads | calls | mean | median | worst | mean to one thread's |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    by_shape = sorted(options.cases, key=_shape)
    for _, group in itertools.groupby(by_shape, key=_shape):
        calls = {case: _make(case) for case in group}
        for count in options.busy:
            with _busy(count, processors):
                times = _measure(calls, options.threads, options.seconds)
            _report(times, count)
    print(f"\nload {os.getloadavg()[0]:.1f} after")


def _shape(case: str) -> str:
    return case.partition(":")[2]


def _make(case: str) -> Callable[[], object]:
    model, size, batch, dtype, mode = case.split(":")
    return make_call(model, int(size), int(batch), getattr(torch, dtype), mode, torch.device("cpu"))


@contextlib.contextmanager
def _busy(count: int, processors: list[int]) -> Iterator[None]:
    """Keep processors busy within the block, the last processor first."""
    loops = [subprocess.Popen([sys.executable, "-c", _LOOP, str(os.getpid())]) for _ in range(count)]
    try:
        for loop, processor in zip(loops, itertools.cycle(reversed(processors))):
            os.sched_setaffinity(loop.pid, {processor})
        time.sleep(0.5 if loops else 0.0)  # until the loops run
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def _measure(
    calls: dict[str, Callable[[], object]], threads: list[int], seconds: float
) -> dict[tuple[str, int], list[float]]:
    """Return the seconds of interleaved calls, by model and number of threads."""
    times: dict[tuple[str, int], list[float]] = {(case, count): [] for case in calls for count in threads}
    deadline = time.perf_counter() + seconds * len(times)
    rounds = 0
    while rounds < 3 or time.perf_counter() < deadline:
        for (case, count), taken in times.items():
            torch.set_num_threads(count)
            calls[case]()  # warm up the caches after the change of threads
            start = time.perf_counter()
            calls[case]()
            taken.append(time.perf_counter() - start)
        rounds += 1
    return times


def _report(times: dict[tuple[str, int], list[float]], busy: int) -> None:
    for (case, threads), taken in times.items():
        single = times.get((case, 1))
        ratio = f"{statistics.mean(taken) / statistics.mean(single):.2f}" if single else ""
        figures = (statistics.mean(taken), statistics.median(taken), max(taken))
        row = (case, busy, threads, len(taken), *(f"{1e3 * figure:.1f}" for figure in figures), ratio)
        print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
