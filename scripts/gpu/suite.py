"""Run everything that a GPU is wanted for, within a deadline, the most valuable first (docs/gpu.md).

Each section is a process with a share of the time. Results are in PREFIX.jsonl as they come; PREFIX.md and PREFIX.json
are made of it after every section, and by `python -m scripts.gpu.report PREFIX.jsonl`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from scripts.gpu.record import Section, append, lines
from scripts.gpu.report import assemble, is_right, write_report

ROOT = Path(__file__).parents[2]
# Sections of a plan in their order, with their shares of the time, in seconds of a run of the plan's usual length.
# What a section leaves goes to those after it.
PLANS = {
    "first": {
        "build": 20,
        "smoke": 45,
        "parity": 75,
        "kernels": 40,
        "models": 120,
        "tune": 40,
        "latency": 20,
        "ncu": 30,
    },
    "second": {"build": 15, "smoke": 40, "variants": 60, "triton": 70, "sizes": 35, "training": 30, "racecheck": 20},
}
SECONDS = {"first": 390.0, "second": 270.0}
# Module and function of each section.
SECTIONS = {
    "build": "checks:build",
    "smoke": "smoke:smoke",
    "parity": "checks:parity",
    "triton": "checks:triton",
    "kernels": "kernels:kernels",
    "tune": "tuning:tune",
    "variants": "tuning:variants",
    "models": "models:models",
    "sizes": "models:sizes",
    "training": "models:training",
    "latency": "models:latency",
    "ncu": "profiling:ncu",
    "racecheck": "profiling:racecheck",
}
# Sections that may take longer than their share: without libraries that were taken along, the build takes a minute.
AT_LEAST = {"build": 100.0}
# Seconds between the deadline that a section knows and its end by force.
GRACE = 2.0
# A section whose process ends is started again, after the step that ended it, if so many seconds are left.
_WORTH_A_START = 12.0


def main() -> int:
    """Run the sections and write the report; return 1 if something failed, else 0."""
    parser = argparse.ArgumentParser(prog="scripts/gpu_suite.sh", description=__doc__)
    parser.add_argument("--plan", choices=list(PLANS), default="first", help="the first or the second call")
    parser.add_argument("--seconds", type=float, help=f"time for everything; default: {SECONDS}")
    parser.add_argument("--output", default="", help="path of the results without a suffix")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), help="these alone, in this order")
    parser.add_argument(
        "--pretend",
        type=float,
        default=0.0,
        metavar="SPEED",
        help="rehearse the times: every step sleeps as long as it takes on a GPU, over SPEED; no torch is needed",
    )
    parser.add_argument("--section", nargs=3, metavar=("NAME", "RECORD", "DEADLINE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.section:
        name, record, deadline = options.section
        run_section(name, Path(record), float(deadline), options.pretend)
        return 0
    gpu = not options.pretend and _gpu_name() != ""
    output = ROOT / (options.output or f"benchmarks/results/gpu-{_slug(_gpu_name()) if gpu else 'rehearsal'}")
    return Suite(options, output, gpu).run()


def run_section(name: str, record: Path, deadline: float, speed: float) -> None:
    """Run one section in this process, which ends with the suite's."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    module, function = SECTIONS[name].split(":")
    section = Section(name, record, deadline, gpu=not speed and _gpu_name() != "", speed=speed)
    getattr(importlib.import_module(f"scripts.gpu.{module}"), function)(section)


class Suite:
    """One run of a plan."""

    def __init__(self, options: argparse.Namespace, output: Path, gpu: bool) -> None:
        self.options, self.gpu = options, gpu
        self.output, self.record = output, output.with_name(output.name + ".jsonl")
        self.start = time.time()
        # A rehearsal on the processor gets more time: few processors compile for minutes.
        seconds = (options.seconds or SECONDS[options.plan]) if gpu or options.pretend else 3600.0
        self.deadline = self.start + seconds / (options.pretend or 1.0)
        self.running: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Run the sections; return 1 if something failed, else 0."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.record.unlink(missing_ok=True)
        append(self.record, command=" ".join(["scripts/gpu_suite.sh", *sys.argv[1:]]), gpu=self.gpu, started=self.start)
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGINT, self._end)
        shares = PLANS[self.options.plan]
        names = self.options.sections or list(shares)
        for i, name in enumerate(names):
            left = self.deadline - time.time()
            later = sum(shares.get(other, 30) for other in names[i:])
            share = max(left * shares.get(name, 30) / later, AT_LEAST.get(name, 0.0) / (self.options.pretend or 1.0))
            self._section(name, min(time.time() + share, self.deadline))
            write_report(self.record)
        ok = is_right(assemble(lines(self.record)))
        print(f"{self.output}.md, .json, .jsonl: {'everything that ran is right' if ok else 'something went wrong'}")
        return 0 if ok else 1

    def _section(self, name: str, limit: float) -> None:
        """Run a section until it is done, or until its time is over."""
        died, start = "", time.time()
        speed = self.options.pretend or 1.0
        while True:
            print(f"== {name}, {start - self.start:.0f} s after the start, {limit - time.time():.0f} s", flush=True)
            begun = self._begun(name)
            died = self._process(name, limit)
            # Steps that ended their process are recorded as begun, and the next process passes over them.
            if died in ("", _TOO_LONG) or self._begun(name) == begun or limit - time.time() < _WORTH_A_START / speed:
                break
        append(self.record, section=name, seconds=round(time.time() - start, 1), died=died)

    def _process(self, name: str, limit: float) -> str:
        """Start a section's process, wait for it, and return how it ended if it did not end well."""
        soft = limit - GRACE / (self.options.pretend or 1.0)
        command = [sys.executable, "-m", "scripts.gpu.suite", "--section", name, str(self.record), str(soft)]
        command += ["--pretend", str(self.options.pretend)]
        # A session of its own, so that all its processes can be ended: one left behind would slow later timings.
        self.running = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        try:
            code = self.running.wait(max(0.1, limit - time.time()))
        except subprocess.TimeoutExpired:
            return _TOO_LONG
        finally:
            self._end_running()
        return "" if code == 0 else f"ended with {code}"

    def _begun(self, name: str) -> set[str]:
        return {line["begun"] for line in lines(self.record) if line.get("section") == name and "begun" in line}

    def _end_running(self) -> None:
        if self.running is not None:
            self._kill_running()
            self.running.wait()
            self.running = None

    def _kill_running(self) -> None:
        if self.running is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.running.pid, signal.SIGKILL)

    def _end(self, number: int, frame: object) -> None:
        """End the section's processes, write the report and end, as the signal asks."""
        self._kill_running()
        append(self.record, cut_off=signal.Signals(number).name)
        write_report(self.record)
        os._exit(128 + number)


_TOO_LONG = "took too long and was ended"


def _end_with(parent: int) -> None:
    """End this process and all it started once its parent is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _gpu_name() -> str:
    """Return the name of the GPU, or an empty text; asking nvidia-smi is quicker than importing torch."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip().split("\n")[0]
    return ""


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
