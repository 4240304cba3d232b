"""What the profiler and the race checker say, where they are installed."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from scripts.gpu.record import Row, Section, Unavailable
from scripts.gpu.smoke import find_tool, sanitized

OPS = ("bidirectional_scan", "bidirectional_scan backward", "bidirectional_conv1d", "bidirectional_conv1d backward")
_METRICS = {
    "Duration",
    "Memory Throughput",
    "DRAM Throughput",
    "Compute (SM) Throughput",
    "SM Frequency",
    "Registers Per Thread",
    "Theoretical Occupancy",
    "Achieved Occupancy",
    "Executed Ipc Active",
    "Issue Slots Busy",
    "L2 Hit Rate",
    "Warp Cycles Per Issued Instruction",
    "Waves Per SM",
}
_SECTIONS = (
    "SpeedOfLight",
    "LaunchStats",
    "Occupancy",
    "WarpStateStats",
    "MemoryWorkloadAnalysis",
    "ComputeWorkloadAnalysis",
)
RACES = [
    ("bidirectional_scan", "forward", "bfloat16"),
    ("bidirectional_scan", "backward", "bfloat16"),
    ("bidirectional_conv1d", "backward", "bfloat16"),
]


def ncu(section: Section) -> None:
    """Profile one call of the scans and the convolutions, with the clocks as they are."""
    for op in OPS:
        section.run(op, 7.0, partial(_profile, op))


def racecheck(section: Section) -> None:
    """Look for races in shared memory in one forward and backward pass."""
    for case in RACES:
        section.run(f"races in {' '.join(case)}", 8.0, partial(sanitized, case, "racecheck", 40.0))


def _profile(op: str) -> Iterator[Row]:
    program = find_tool("ncu")
    if program is None:
        raise Unavailable("ncu is not installed")
    # The clocks are the machine's business, and other programs may be running.
    command = [program, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "details"]
    command += [word for name in _SECTIONS for word in ("--section", name)]
    command += [sys.executable, "-m", "scripts.gpu.ops", "--profile", op]
    done = subprocess.run(command, capture_output=True, text=True, timeout=40, check=False)
    found = list(metrics(done.stdout))
    yield from ({"op": op, **row} for row in found)
    if not found:
        raise RuntimeError(f"ncu measured nothing: {(done.stdout + done.stderr).strip()[-200:]}")


def metrics(text: str) -> Iterator[Row]:
    """Yield a row for each kernel of ncu's CSV, which begins after the program's own output and ncu's messages."""
    start = text.find('"ID"')
    if start < 0:
        return
    kernels: dict[str, Row] = {}
    for line in csv.DictReader(text[start:].splitlines()):
        if line.get("Metric Name") in _METRICS:
            row = kernels.setdefault(line["ID"], {"kernel": line["Kernel Name"][:60]})
            row[line["Metric Name"]] = f"{line['Metric Value']} {line['Metric Unit']}".strip()
    yield from kernels.values()
