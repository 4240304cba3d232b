"""A run gets a folder of its own, and what is in a folder already stays."""

from __future__ import annotations

import os

import pytest
import torch

from tests.tiny_runs import tiny_config
from vim.runtime.machine import describe_environment
from vim.training.run_folder import RunFolder, choose_run_folder


def test_a_run_is_called_after_its_recipe_and_two_at_once_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = set()
    for _ in range(3):
        folder = choose_run_folder(tiny_config(recipe="trial"), None)
        folder.path.mkdir(parents=True)
        paths.add(folder.path)
    assert len(paths) == 3
    assert all(path.parent.name == "runs" and path.name.startswith("trial-20") for path in paths)


def test_a_folder_with_files_in_it_is_not_written_into(tmp_path):
    assert choose_run_folder(tiny_config(), tmp_path).path == tmp_path  # empty
    (tmp_path / "note.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"--output must be a new or an empty folder, and .* is not empty: .* --resume"
    ):
        choose_run_folder(tiny_config(), tmp_path)
    with pytest.raises(ValueError, match=r"--output must be a folder, and .*note.txt is a file"):
        choose_run_folder(tiny_config(), tmp_path / "note.txt")
    with pytest.raises(ValueError, match=r"--output must be a name in UTF-8, got .*caf\\udce9"):
        choose_run_folder(tiny_config(), tmp_path / os.fsdecode(b"caf\xe9"))


def test_a_file_that_a_killed_run_left_half_written_is_removed(tmp_path):
    (tmp_path / ".last.pth.77.tmp").write_bytes(b"half")
    RunFolder(tmp_path).write_start(tiny_config(), torch.device("cpu"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "environment.json"]


def test_the_environment_says_what_ran_where():
    environment = describe_environment(torch.device("cpu"))
    assert environment["versions"]["torch"] == torch.__version__
    assert {"started", "command", "folder", "commit", "python", "platform", "cpus", "threads"} <= set(environment)
