"""Plain lines without a terminal, a bar with one, and a line for each epoch."""

from __future__ import annotations

import io

from rich.console import Console

from tests.tasks.test_classification import ROW
from vim.training import progress
from vim.training.progress import Reporter, describe_epoch, loading_advice


def test_without_a_terminal_lines_appear_now_and_then(monkeypatch):
    clock = iter(range(0, 10000, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    with Reporter(100, first_step=20, console=Console(file=out, force_terminal=False)) as reporter:
        for done in range(21, 26):
            reporter.step("epoch 1/2", done, "loss 0.500")
    lines = out.getvalue().splitlines()
    assert len(lines) == 2  # a line in 30 seconds, of steps every 20
    # After 40 seconds two of the 80 steps to do are done: 78 steps of 20 seconds are left.
    assert lines[0] == "epoch 1/2  22 %  loss 0.500  0:26:00 left"


def test_on_a_terminal_a_bar_shows_figures_and_time_left():
    out = io.StringIO()
    with Reporter(100, console=Console(file=out, force_terminal=True, width=120)) as reporter:
        reporter.step("epoch 1/2", 50, "loss 0.500  800 images/s")
        reporter.line("a line above")
    text = out.getvalue()
    for words in ("epoch 1/2", "50 %", "loss 0.500", "800 images/s", "left", "a line above"):
        assert words in text


def test_an_epoch_is_described_in_a_line():
    line = describe_epoch(ROW, 300, "training: loss 1.500")
    assert line == ("epoch   1/300  training: loss 1.500  gradient 0.51  1,234 images/s, 3 % waiting  1.2 GiB  0:01:15")
    more = describe_epoch({**ROW, "skipped_steps": 2, "memory_gib": None}, 300, "")
    assert "2 steps skipped" in more
    assert "GiB" not in more


def test_waiting_for_images_is_said_when_it_takes_a_fifth_of_the_time(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    row = {**ROW, "data_wait_percent": 37.4, "seconds": 60.0}
    assert loading_advice({**row, "data_wait_percent": 20.0}, workers=4) == []
    assert loading_advice({**row, "seconds": 9.0}, workers=4) == []
    (line,) = loading_advice(row, workers=4)
    assert line.startswith("advice: 37 % of the training time went into waiting for images; raise data.workers, now 4")
    assert "data.workers" not in loading_advice(row, workers=8)[0]
