"""The benchmark of ops: every implementation that is there computes the same, and the record says what is not."""

from __future__ import annotations

import json

from vim import benchmark
from vim.benchmarking import operations


def test_every_implementation_gives_the_same_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(operations, "SHAPES", ((8, 5, 3),))
    output = tmp_path / "ops"
    assert benchmark.main(["--ops", "--rounds", "1", "--output", str(output)]) == 0
    record = json.loads(output.with_suffix(".json").read_text())
    found = {(row["op"], row["implementation"]) for row in record["rows"]}
    assert {
        ("selective_scan", "vim"),
        ("selective_scan", "vim, reference"),
        ("selective_scan", "torch associative_scan"),
        ("selective_scan", "transformers, slow path"),
        ("causal_conv1d", "torch conv1d"),
    } <= found
    assert all(row["largest_error"] < 1e-4 for row in record["rows"])
    assert ("causal_conv1d", "causal-conv1d-mojo") in found or "causal-conv1d-mojo" in record["not_measured"]
    assert output.with_suffix(".md").read_text() == capsys.readouterr().out
