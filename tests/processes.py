"""Run commands, and functions in processes of their own, most of them forked so that they need not import torch."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import traceback
from collections.abc import Callable
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# Forks of a process that has imported what the functions need, and done nothing else: OpenMP hangs and autograd refuses
# in the fork of a process in which they have started threads.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.training.test_kill", "tests.training.test_run_lock"])


def _run(
    function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], streams: Any, results: Any
) -> None:
    os.environ.update(environment)
    for number, stream in enumerate(streams, 1):
        os.dup2(stream.detach(), number)
    try:
        results.put((environment.get("RANK", "0"), function(*arguments), None))
    except BaseException:  # handed to the parent, which fails with it
        results.put((environment.get("RANK", "0"), None, traceback.format_exc()))


def run_command(*command: object, timeout: float | None = None, **environment: str) -> str:
    """Run a command in the folder of the repository and return what it prints; fail with its errors."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


def start(function: Callable[..., Any], *arguments: Any) -> Any:
    """Start a function of a module in one process, which the caller may kill."""
    process = _CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def run_together(count: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """Run a function in as many processes as torchrun would start, and return its results by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = _CONTEXT.Queue()
    processes = []
    for rank in range(count):
        environment = {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        }
        streams = [DupFd(number) for number in (1, 2)]  # of this test, not of the one that started the server
        processes.append(_CONTEXT.Process(target=_run, args=(function, arguments, environment, streams, results)))
        processes[-1].start()
    values: list[Any] = [None] * count
    try:
        for _ in range(count):
            rank, value, error = results.get(timeout=timeout)
            assert error is None, f"process {rank}: {error}"
            values[int(rank)] = value
    finally:
        for process in processes:
            process.join(timeout=5)
            process.kill()
    return values
