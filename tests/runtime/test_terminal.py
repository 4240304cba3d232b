"""Progress of the command lines: on standard error only, a bar on a terminal and lines elsewhere."""

from __future__ import annotations

import sys

import pytest
from rich.console import Console

from vim.runtime import terminal
from vim.runtime.terminal import with_progress


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_leaves_standard_output_to_the_command(is_terminal, monkeypatch, capsys):
    monkeypatch.setattr(Console, "is_terminal", is_terminal)
    for item in with_progress([1, 2, 3], "counting", 3):
        sys.stdout.write(f"{item}\n")
    assert capsys.readouterr().out == "1\n2\n3\n"


def test_without_a_terminal_progress_is_lines(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "_PLAIN_INTERVAL", -1.0)
    assert list(with_progress("abcd", "counting", 4)) == list("abcd")
    assert capsys.readouterr().err.splitlines() == [f"counting: {share} %" for share in (0, 25, 50, 75)]
    assert list(with_progress("ab", "counting", 2, shown=False)) == ["a", "b"]
    assert capsys.readouterr().err == ""
