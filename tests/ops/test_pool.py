"""The native CPU kernels' own threads: any number, several callers, forks, few processors, denormals, exits."""

from __future__ import annotations

import functools
import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tests.helpers import make_bidirectional_inputs, make_scan_inputs
from tests.ops.natives import needs_native
from tests.processes import ROOT, run_command, run_together
from vim.ops.build import compilation

pytestmark = [
    needs_native,
    pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc"),
]
PROCESSORS = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@functools.cache
def _inputs(seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs, made before any fork: PyTorch's own threads, which make them, do not survive one."""
    bidirectional = [t.detach() for t in make_bidirectional_inputs(1, 197, 96, 16, 6, seed=seed)]
    return bidirectional, [t.detach() for t in make_scan_inputs(2, 96, 197, 16, seed=seed).values()]


def _scan(seed: int = 0) -> list[torch.Tensor]:
    """Results of scans that are worth three threads."""
    bidirectional, selective = _inputs(seed)
    return [
        *torch.ops.vim.bidirectional_scan(*bidirectional, 0.5, 64),
        *torch.ops.vim.selective_scan(*selective, True, True, 64),
    ]


def _same(results: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    # NumPy compares in this thread; `torch.equal` would hang after a fork.
    return all(np.array_equal(a.numpy(), b.numpy()) for a, b in zip(results, expected, strict=True))


def _alone(seed: int = 0) -> list[torch.Tensor]:
    torch.set_num_threads(1)
    try:
        return _scan(seed)
    finally:
        torch.set_num_threads(2)


def _pool_threads() -> int:
    return sum(path.read_text() == "vim-pool\n" for path in Path("/proc/self/task").glob("*/comm"))


def test_number_of_threads_changes_between_calls():
    expected = _alone()
    for threads in (1, 2, 4, 7, 2, 1, 7):
        torch.set_num_threads(threads)
        assert all(_same(_scan(), expected) for _ in range(5)), threads


def test_eight_callers_at_once():
    expected = [_alone(seed) for seed in range(8)]
    wrong = []

    def call(seed: int) -> None:
        torch.set_num_threads(2 + seed % 3)
        wrong.extend(seed for _ in range(10) if not _same(_scan(seed), expected[seed]))

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def _run_on(processors: set[int], threads: int, expected: list[torch.Tensor]) -> tuple[int, bool]:
    os.sched_setaffinity(0, processors)
    torch.set_num_threads(threads)
    inherited = _pool_threads()
    right = all(_same(_scan(), expected) for _ in range(5))
    return _pool_threads() - inherited, right


@pytest.mark.parametrize("count", [1, 2])
def test_forked_process_has_threads_of_its_own_and_no_more_than_processors(count):
    expected = _alone()
    assert _same(_scan(), expected)
    assert _pool_threads() == 0 or PROCESSORS > 1
    processors = sorted(os.sched_getaffinity(0))[:count]
    with multiprocessing.get_context("fork").Pool(1) as fork:
        assert fork.apply(_run_on, (set(processors), 7, expected)) == (len(processors) - 1, True)


def test_no_more_threads_than_torch_is_set_to():
    assert run_together(1, _run_on, os.sched_getaffinity(0), 1, _alone()) == [(0, True)]


class _Scans(Dataset):
    def __init__(self, expected: list[list[torch.Tensor]]):
        self.expected = expected

    def __len__(self) -> int:
        return len(self.expected)

    def __getitem__(self, index: int) -> bool:
        torch.set_num_threads(2)  # a loader gives its workers one
        return _same(_scan(index), self.expected[index])


def test_workers_of_a_loader():
    expected = [_alone(seed) for seed in range(4)]
    assert _same(_scan(), expected[0])
    loader = DataLoader(_Scans(expected), batch_size=2, num_workers=2, multiprocessing_context="fork")
    assert all(right.all() for right in loader)


def test_denormals_are_the_callers_choice():
    x, weight, y = torch.full((197, 192), 1e-40), torch.ones(192, 768), torch.empty(197, 768)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    try:
        for flushes in (True, False, True):
            torch.set_flush_denormal(flushes)
            for _ in range(10):
                torch.ops.vim.product_(x, weight, None, False, y)
                torch.set_flush_denormal(False)
                assert (y == 0).all() if flushes else (y > 1e-38).all()
                torch.set_flush_denormal(flushes)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.slow
def test_exits_right_after_use():
    """A process that has used the pool forks, its child uses it too, and both end as any other."""
    code = """
        import os, sys
        from tests.ops.test_pool import _alone, _same, _scan
        expected = _alone()
        assert _same(_scan(), expected)
        child = os.fork()
        if child == 0:
            assert _same(_scan(), expected)
            sys.exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert _same(_scan(), expected)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_pool_under_stress(tmp_path):
    """More callers, threads and jobs than there is room for, jobs within jobs, and the quotas of containers."""
    compiler = compilation.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    sources = ("csrc/cpu/pool.cpp", "csrc/cpu/processors.cpp", "scripts/pool_driver.cpp")
    driver = str(tmp_path / "driver")
    command = [*compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *sources, "-o", driver, "-pthread"]
    run_command(*command)
    assert run_command(driver, timeout=120) == "pool: 0 failures\n"
