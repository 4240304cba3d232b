"""Figures of every epoch in `summary.csv`."""

from __future__ import annotations

import csv

from vim.training.recorder import Recorder

ROW = {"epoch": 1, "step": 10, "val_loss": 1.25, "ema_top1": None}


def test_the_summary_has_a_row_an_epoch(tmp_path):
    writer = Recorder(tmp_path / "summary.csv")
    second = {**ROW, "epoch": 2, "step": 20, "val_loss": 0.1}
    writer.write_epoch([ROW])
    writer.write_epoch([ROW, second])
    writer.close()
    with open(tmp_path / "summary.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["val_loss"], row["ema_top1"]) for row in rows] == [("1", "1.25", ""), ("2", "0.1", "")]
