"""The benchmark of other packages' models: it measures what is installed, and the record says what is not."""

from __future__ import annotations

import json

from vim import benchmark
from vim.benchmarking import family


def test_every_task_has_a_row_for_each_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(family, "_WIDTH", 32)
    monkeypatch.setattr(family, "_VOCABULARY", 50)
    monkeypatch.setattr(family, "_vision_calls", _nothing_installed)
    output = tmp_path / "family"
    sizes = ["--layers", "1", "--prompt", "20", "--new_tokens", "2", "--rounds", "1"]
    assert benchmark.main(["--family", *sizes, "--output", str(output)]) == 0
    record = json.loads(output.with_suffix(".json").read_text())
    found = [(row["task"].rpartition(" ")[2], row["model"]) for row in record["rows"]]
    assert found == [
        ("prefill", "on vim.compat"),
        ("prefill", "slow path"),
        ("prefill", "matrix products alone"),
        ("generation", "on vim.compat"),
        ("generation", "slow path"),
    ]
    assert record["not_measured"] == {"image": "no mambavision"}
    assert output.with_suffix(".md").read_text() == capsys.readouterr().out


def _nothing_installed():
    raise ImportError("no mambavision")
