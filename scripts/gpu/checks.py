"""The build, and the tests in tests/gpu."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial

from scripts.gpu.record import Row, Section, Unavailable

# Seconds in which pytest starts and collects.
_START = 20.0


def build(section: Section) -> None:
    """Build what was not taken along, and load the CPU library and, on a GPU, the CUDA library."""
    section.run("build", 6.0, lambda: _build(cuda=True), lambda: _build(cuda=False))
    section.run("doctor", 4.0, _doctor, _doctor)
    section.run("libraries", 5.0, lambda: _machine(cuda=True), lambda: _machine(cuda=False))


def parity(section: Section) -> None:
    """Compare the native kernels with the original's numbers and the reference, and check what only a GPU shows."""
    native = partial(_tests, section, "not triton and not mamba_ssm and not compile", 8)
    section.run("tests of the native kernels", _START + 30.0, native, native)


def triton(section: Section) -> None:
    """Do the same with the Triton kernels, whose compilation takes most of the time, and with torch.compile."""
    section.run("tests of the Triton kernels", _START + 30.0, lambda: _tests(section, "triton or compile", 14))


def _build(cuda: bool) -> Iterator[Row]:
    start = time.monotonic()
    command = [sys.executable, "-m", "vim.build", *(["--cuda"] if cuda else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).strip().splitlines()[-3:]
    yield {"step": "build", "ok": done.returncode == 0, "seconds": round(time.monotonic() - start, 1), "said": said}


def _doctor() -> Iterator[Row]:
    done = subprocess.run([sys.executable, "-m", "vim.doctor"], capture_output=True, text=True, check=False)
    yield {"step": "doctor", "ok": done.returncode == 0, "said": done.stdout.splitlines()}


def _machine(cuda: bool) -> Iterator[Row]:
    from vim.ops.backends import native
    from vim.runtime.machine import describe_machine

    yield {"step": "machine", **describe_machine()}
    libraries = {"cpu": native.cpu} | ({"cuda": native.cuda} if cuda else {})
    for name, library in libraries.items():
        why = library.load()
        yield {"step": f"load {name}", "ok": why is None, "said": why or str(library.path)}


def _tests(section: Section, which: str, at_a_time: int) -> Iterator[Row]:
    """Run the tests whose names match; the plugin records failures as they come, and counts."""
    if importlib.util.find_spec("pytest") is None:
        raise Unavailable("pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=-ra --strict-markers", "-p", "no:cacheprovider"]
    command += ["-p", "scripts.gpu.recorder", "-k", which, "tests/gpu"]
    if section.gpu and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(at_a_time, os.cpu_count() or 1)), "--dist", "worksteal"]
    environment = {**os.environ, "VIM_GPU_RECORD": f"{section.name}:{section.path}"}
    code = subprocess.run(command, env=environment, check=False).returncode
    # 5: no test was chosen
    yield {"step": "pytest", "ok": code in (0, 5), "exit_code": code}
