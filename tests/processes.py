"""Run commands, Python and functions in processes of their own; forks, unlike commands, need not import torch."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# Forks of a process that has imported the large packages, and done nothing else: OpenMP hangs and autograd refuses
# in the fork of a process in which they have started threads.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preloaded"])


def _run(
    function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], streams: Any, results: Any
) -> None:
    os.environ.update(environment)
    _use(streams)
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


class Python:
    """A new Python without the seconds that torch and timm take to import; `vim` is imported as if for the first time.

    Args:
        words: `-c CODE` or `-m MODULE`, and arguments.
        stdout: A file for standard output, such as a pipe; `communicate` returns what goes to none.
        stderr: The same for standard error.
        environment: Variables to set beside this process's own.
    """

    def __init__(
        self, *words: object, stdout: int | None = None, stderr: int | None = None, **environment: str
    ) -> None:
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115, open until the process is read
        given = (stdout, stderr)
        streams = [DupFd(f.fileno() if n is None else n) for f, n in zip(self._files, given, strict=True)]
        variables = {**os.environ, **environment}
        self.process = _CONTEXT.Process(target=_be_python, args=([str(word) for word in words], variables, streams))
        self.process.start()

    def communicate(self, timeout: float = 300.0) -> tuple[str, str]:
        """Wait for the end, and return what was printed to standard output and to standard error."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"longer than {timeout} s")
        for file in self._files:
            file.seek(0)
        out, err = (file.read().decode(errors="replace") for file in self._files)
        return out, err

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None before the end."""
        return self.process.exitcode


def _be_python(words: Sequence[str], environment: Mapping[str, str], streams: Any) -> None:
    """Do what Python does with the words of a command line."""
    os.chdir(ROOT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores for what it runs in the background
    os.environ.clear()
    os.environ.update(environment)
    _use(streams)
    option, what, *arguments = words
    sys.argv, sys.orig_argv = [option, *arguments], [sys.executable, *words]
    if option == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


def _use(streams: Any) -> None:
    for number, stream in enumerate(streams, 1):
        os.dup2(stream.detach(), number)


def run_python(*words: object, **environment: str) -> str:
    """Run `python -c CODE` or `python -m MODULE` and return what it prints; fail with its errors."""
    python = Python(*words, **environment)
    out, err = python.communicate()
    assert python.returncode == 0, out[-6000:] + err[-6000:]
    return out


def start(function: Callable[..., Any], *arguments: Any) -> Any:
    """Start a function of a module in one process, which the caller may kill, and return as soon as it begins."""
    began, begin = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_announce, args=(begin, function, arguments))
    process.start()
    begin.close()
    began.recv()
    return process


def _announce(begin: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    begin.send(None)
    begin.close()
    function(*arguments)


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
