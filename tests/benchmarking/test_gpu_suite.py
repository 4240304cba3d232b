"""The GPU suite as far as it goes without a GPU: its times, its record, what it counts, and what it survives."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from scripts.gpu import kernels, ops, profiling, smoke, suite, tuning
from scripts.gpu.record import Section, Unavailable, append, lines
from scripts.gpu.report import assemble, is_right, write_report
from tests.processes import ROOT, run_command
from vim.benchmarking.models import measure_case
from vim.ops.backends import native
from vim.ops.build import compilation
from vim.runtime import gpu


def start_pretending(output: Path, speed: float, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "scripts.gpu.suite", "--pretend", str(speed), "--output", str(output), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def section_of(path: Path, gpu: bool = True, seconds: float = 60.0) -> Section:
    return Section("here", path, time.time() + seconds, gpu)


# ---- times -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("plan", "speed"), [pytest.param("first", 20.0, marks=pytest.mark.slow), ("second", 60.0)])
def test_a_plan_ends_at_its_deadline_and_runs_every_section(plan, speed, tmp_path):
    """With the times that a GPU would take, sped up; processes start as slowly as ever."""
    begun = time.time()
    out, _ = start_pretending(tmp_path / "gpu", speed, "--plan", plan).communicate()
    assert time.time() - begun < suite.SECONDS[plan] / speed + 4, out
    run = json.loads((tmp_path / "gpu.json").read_text())
    assert list(run["sections"]) == list(suite.PLANS[plan])
    assert all(section["rows"] or section["not_run"] for section in run["sections"].values()), out
    if speed <= 20.0:  # else a start takes longer than a section
        assert all(section["rows"] and not section["died"] for section in run["sections"].values()), out
    assert "nothing was measured" in (tmp_path / "gpu.md").read_text()
    assert len(list(tmp_path.iterdir())) == 3, "few files come back from a borrowed machine"


def test_every_section_exists_without_torch():
    """A process of the suite starts quickly, and the rehearsal of times needs no torch."""
    code = "import importlib, sys\nfrom scripts.gpu.suite import SECTIONS\n"
    code += "for place in SECTIONS.values():\n    module, name = place.split(':')\n"
    code += "    assert callable(getattr(importlib.import_module(f'scripts.gpu.{module}'), name)), place\n"
    run_command(sys.executable, "-c", code + "assert 'torch' not in sys.modules", PYTHONPATH=str(ROOT))
    planned = {name for plan in suite.PLANS.values() for name in plan}
    assert planned == set(suite.SECTIONS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_cut_off_leaves_its_results_and_no_process(number, tmp_path):
    # The second step of the section would take a minute.
    process = start_pretending(tmp_path / "gpu", 0.1, "--sections", "latency", "--seconds", "100")
    record = tmp_path / "gpu.jsonl"
    while not any("begun" in line for line in lines(record)):
        assert process.poll() is None
        time.sleep(0.02)
    append(record, section="latency", row={"model": "measured before"})
    (child,) = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.send_signal(number)
    process.wait(5)
    deadline = time.monotonic() + 5
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(child)
    write_report(record)
    report = (tmp_path / "gpu.md").read_text()
    assert "measured before" in report
    assert "latency of vim Ti at 224px: begun, not ended" in report
    assert ("Cut off by SIGTERM" in report) == (number == signal.SIGTERM)


def test_a_section_that_hangs_is_ended_with_all_it_started(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nsleep 60 & echo $! > {tmp_path}/pid\nwait\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    assert _suite(tmp_path)._process("smoke", time.time() + 0.5) == "took too long and was ended"
    grandchild = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while _runs(grandchild) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(grandchild)


def test_a_section_whose_process_ends_goes_on_after_the_step_that_ended_it(tmp_path, monkeypatch):
    one, done = _suite(tmp_path), []

    def process(name: str, limit: float) -> str:
        section = Section(name, one.record, limit, gpu=False)
        for step in ("a", "b", "c"):
            if step == "b" and step not in section._begun:
                append(one.record, section=name, begun="b")
                return "ended with -11"
            section.run(step, 0.0, tuple, lambda step=step: done.append(step) or ())
        return ""

    monkeypatch.setattr(one, "_process", process)
    one._section("smoke", time.time() + 60)
    assert done == ["a", "c"]
    run = assemble(lines(one.record))["sections"]["smoke"]
    assert (run["unfinished"], run["died"]) == (["b"], "")


def _suite(folder: Path) -> suite.Suite:
    options = argparse.Namespace(plan="first", seconds=100.0, pretend=0.0, sections=None)
    return suite.Suite(options, folder / "gpu", gpu=True)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


# ---- steps -------------------------------------------------------------------------------------------------------


def test_an_error_of_a_step_is_recorded_and_the_next_step_runs(tmp_path):
    class CompilationError(Exception):
        """As Triton's, which is no RuntimeError."""

    def fails() -> list[dict[str, object]]:
        raise CompilationError("at 31:4\nmore")

    section = section_of(tmp_path / "r.jsonl", gpu=False)
    section.run("first", 0.0, tuple, fails)
    section.run("second", 0.0, tuple, lambda: [{"x": 1}])
    run = assemble(lines(section.path))["sections"]["here"]
    assert run["failed"] == ["first: CompilationError: at 31:4"]
    assert run["rows"] == [{"x": 1}]


def test_a_tool_that_is_not_installed_is_no_failure(tmp_path):
    def fails() -> list[dict[str, object]]:
        raise Unavailable("ncu is not installed")

    section = section_of(tmp_path / "r.jsonl", gpu=False)
    section.run("profile", 0.0, tuple, fails)
    run = assemble(lines(section.path))
    assert run["sections"]["here"]["not_run"] == ["profile: ncu is not installed"]
    assert is_right(run)


def test_a_step_that_does_not_fit_is_not_begun(tmp_path):
    section = section_of(tmp_path / "r.jsonl", seconds=3.0)
    section.run("long", 5.0, lambda: pytest.fail("begun"))
    assert assemble(lines(section.path))["sections"]["here"]["not_run"] == ["long: the time was over"]


def test_a_line_that_was_cut_off_is_passed_over(tmp_path):
    path = tmp_path / "r.jsonl"
    append(path, section="here", row={"x": 1})
    with open(path, "a") as file:
        file.write('{"section": "here", "row": {"x"')
    assert assemble(lines(path))["sections"]["here"]["rows"] == [{"x": 1}]


@pytest.mark.parametrize(
    ("line", "right"),
    [
        ({"row": {"ok": True}}, True),
        ({"not_run": "mamba_ssm: not installed"}, True),
        ({"facts": {"skipped": 3}}, True),
        ({"row": {"ok": False}}, False),
        ({"failed": "Ti 224 b128: RuntimeError: CUDA error"}, False),
        ({"begun": "Ti 224 b128"}, False),
        ({"seconds": 1.0, "died": "took too long and was ended"}, False),
    ],
)
def test_what_is_skipped_is_not_wrong(line, right, tmp_path):
    append(tmp_path / "r.jsonl", section="here", **line)
    assert is_right(assemble(lines(tmp_path / "r.jsonl"))) is right


# ---- sections ----------------------------------------------------------------------------------------------------


def test_bytes_of_the_kernels_are_those_of_their_tensors():
    shape = ops.Shape(name="", batch=2, len=65, d_model=32)
    assert (shape.dim, shape.dt_rank, shape.tokens) == (64, 2, 130)
    found = {kernel.op: kernel for kernel in ops.kernels_of(shape, torch.bfloat16, "cpu")}
    inner = 2 * 65 * 64
    assert found["add_rms_norm"].bytes == 2 * 65 * 32 * (2 + 4 + 2 + 4)
    assert found["bidirectional_conv1d"].bytes == 3 * inner * 2
    assert found["bidirectional_scan"].bytes == 4 * inner * 2 + 2 * (2 * 65 * (2 + 32) * 2)
    assert found["bidirectional_scan"].special == 2 * inner * 18
    assert found["bidirectional_scan backward"].special == 2 * found["bidirectional_scan"].special
    assert set(profiling.OPS) <= set(found)


def test_shapes_have_names_that_exist():
    assert set(kernels.SHAPES) | set(tuning.SHAPES) <= set(ops.SHAPES)


def test_limits_are_those_of_the_card(monkeypatch):
    card = argparse.Namespace(memory_clock_rate=2619000, memory_bus_width=5120, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(ops, "describe_gpu", lambda: {"clock_limit_mhz": 1980.0})
    monkeypatch.setattr(ops, "probe_gpu", lambda: {"copy_gb_per_s": 3000, "clock_mhz": 1755.0, "power_w": None})
    limits = ops.limits_of_card()
    assert limits["memory_gb_per_s"] == 3352, "an H100's"
    assert limits["special_per_s"] == 132 * 16 * 1980e6
    assert limits["copy_gb_per_s"] == 3000


@pytest.fixture
def small_card(monkeypatch):
    """As if the processor were a GPU on which every pass takes 1 ms."""
    small = ops.Shape(name="small", batch=1, len=5, d_model=16)
    card = argparse.Namespace(multi_processor_count=2)
    monkeypatch.setattr(ops, "SHAPES", {name: small for name in ops.SHAPES})
    monkeypatch.setattr(ops, "kernels_of", functools.partial(ops.kernels_of, device="cpu"))
    monkeypatch.setattr(ops, "available_backends", lambda *of: ("native", "reference"))
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    for module in (ops, gpu):
        monkeypatch.setattr(module, "captured", lambda calls, stream: lambda: [call() for call in calls])
        monkeypatch.setattr(module, "time_calls", lambda calls, repeats: [call() for call in calls] and 1e-3)


def test_rows_of_kernels(small_card, monkeypatch):
    limits = {"copy_gb_per_s": 3000.0, "memory_gb_per_s": 3352.0, "special_per_s": 1e12}
    rows = list(kernels._rows("Ti 224 b1", limits))
    assert [row["op"] for row in rows] == [kernel.op for kernel in ops.kernels_of(ops.REHEARSAL, torch.bfloat16)]
    assert all({"microseconds", "of_copy", "of_memory", "of_special_functions"} < set(row) for row in rows)
    assert rows[0]["microseconds"] == 1e3 / ops._MAX_SETS
    monkeypatch.setattr(ops, "_measure", lambda *arguments: 1 / 0)
    assert {row["why"] for row in ops.kernel_rows(ops.REHEARSAL, torch.bfloat16, "native", {})} == {
        "ZeroDivisionError: division by zero"
    }


def test_the_sweep_measures_every_choice_and_ends_with_the_table(small_card, monkeypatch):
    chosen = []

    def tune_scan(*choice: int) -> int:
        chosen.append(choice)
        return 1

    assert native.cpu.load() is None  # by the real CDLL
    library = argparse.Namespace(vim_cuda_tune_scan=tune_scan)
    monkeypatch.setattr("ctypes.CDLL", lambda path: library)
    monkeypatch.setattr(native, "cuda", argparse.Namespace(load=lambda: None, path="library"))
    best: list[dict[str, object]] = []
    row, every = tuning._sweep("Ti 224 b1", best)
    assert best == [row]
    assert (row["channels_per_multiprocessor"], row["microseconds"]) == (2 * 32 / 2, 1000.0)
    assert len(every["every choice"]) == len(tuning.choices(5))
    assert chosen == [(0, 0, 0), *tuning.choices(5), (0, 0, 0)]


def test_ways_to_cut_a_short_and_a_long_scan():
    assert {chunk for _, _, chunk in tuning.choices(197)} == {128, 192, tuning._UNCUT}
    assert len(tuning.choices(6085)) == 2 * 3 * 6
    assert all(chunk % 64 == 0 for _, _, chunk in tuning.choices(6085))


def test_the_best_choices_are_rows_of_the_table(tmp_path):
    best = [
        {"shape": "large", "channels_per_multiprocessor": 745, "channels": 2, "warps": 1, "chunk": 0},
        {"shape": "long", "channels_per_multiprocessor": 6, "channels": 1, "warps": 2, "chunk": 320},
        {"shape": "small", "channels_per_multiprocessor": 6, "channels": 1, "warps": 1, "chunk": 0},
    ]
    for row in best:
        row.update(microseconds=10.5, table_microseconds=12.0)
    text = tuning.table(best)
    assert text.splitlines()[1:] == [
        "{0, 1, 2, true},  // long, chunks of 320: 10.5, 12.0; small, not cut: 10.5, 12.0",
        "{745, 2, 1, false},  // large, not cut: 10.5, 12.0",
    ]
    source = (ROOT / "csrc/cuda/scan_tuning.cu").read_text()
    pasted, count = re.subn(r"(kTable\[\] = \{\n).*?(\n\};)", rf"\g<1>{text}\g<2>", source, flags=re.DOTALL)
    assert count == 1
    (tmp_path / "tuning.cpp").write_text(pasted)
    compiler = compilation.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    includes = (f"-I{ROOT / 'csrc/cuda'}", f"-I{ROOT / 'tests/cuda'}")
    run_command(*compiler, "-std=c++17", "-fsyntax-only", *includes, tmp_path / "tuning.cpp")


def test_metrics_of_the_profiler():
    text = '==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
    text += (
        '"0","scan(int)","Duration","us","98.2"\n"0","scan(int)","Something","","1"\n"1","merge","Duration","us","3"\n'
    )
    assert list(profiling.metrics(text)) == [
        {"kernel": "scan(int)", "Duration": "98.2 us"},
        {"kernel": "merge", "Duration": "3 us"},
    ]
    assert list(profiling.metrics("==ERROR== no permission")) == []


@pytest.mark.parametrize("op", smoke.OPS)
def test_smoke_cases_pass_on_the_processor(op):
    for side in ("forward", "backward"):
        assert max(smoke.errors(op, side, "float32", "cpu")) < smoke._BOUND["float32"]


@pytest.mark.slow
def test_a_smoke_case_in_its_process(monkeypatch):
    case = ("add_rms_norm", "forward", "float32")
    monkeypatch.chdir(ROOT)
    failed: list[tuple[str, str, str]] = []
    (row,) = smoke._round([case], False, failed)
    assert (row["ok"], failed) == (True, [])
    assert 0 <= row["error"] < smoke._BOUND["float32"]
    (row,) = smoke._round([(*case[:2], "no dtype")], False, failed)
    assert (row["ok"], row["exit_code"]) == (False, 2)
    assert failed == [(*case[:2], "no dtype")]
    assert "invalid choice" in row["said"][-1]


def test_a_model_that_does_not_run_is_named_and_the_others_are_measured():
    rows, failed = measure_case(
        ["vim_tiny_patch16_224", "vim_tiny_patch16_224:triton"],
        32,
        1,
        "float32",
        "inference",
        torch.device("cpu"),
        1,
        1,
    )
    assert [row.model for row in rows] == ["vim_tiny_patch16_224"]
    (reason,) = failed.values()
    assert "triton" in reason


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: this is about its absence")
def test_rehearsal(tmp_path):
    """Everything that the processor can do, without the packages that a borrowed machine lacks."""
    missing = ("jsonargparse", "rich", "matplotlib", "sklearn", "tensorboard")
    code = f"import sys\nfor name in {missing}:\n    sys.modules[name] = None\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    sections = ("build", "kernels", "models", "training", "latency", "ncu")
    command = ("bash", "scripts/gpu_suite.sh", "--output", tmp_path / "run" / "gpu", "--sections", *sections)
    run_command(*command, PYTHON=sys.executable, PYTHONPATH=str(tmp_path))
    run = json.loads((tmp_path / "run" / "gpu.json").read_text())
    assert run["gpu"] is False
    assert not any(section["died"] or section["unfinished"] for section in run["sections"].values())
    assert run["sections"]["latency"]["not_run"][0] == "latency of vim Ti at 224px: no GPU"
    report = (tmp_path / "run" / "gpu.md").read_text()
    assert "there was no GPU" in report
