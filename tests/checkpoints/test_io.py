"""Checkpoints are whole or not there, give back what was saved, and refuse what is damaged or not ours."""

from __future__ import annotations

import os
import random
import re
import resource

import numpy as np
import pytest
import torch
from torch import nn

from vim.checkpoints.io import (
    CheckpointError,
    atomic_writer,
    load_checkpoint,
    load_into,
    load_weights,
    rng_state,
    save_checkpoint,
    save_weights,
    set_rng_state,
    write_text,
)
from vim.inference.trained_model import load_trained_model
from vim.models.pretrained import read_checkpoint


class Unsaveable:
    def __reduce__(self):
        raise OSError("No space left on device")


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"model": {"weight": torch.arange(2000.0)}, "epoch": 3, "names": ["a", "b"], "best": None})
    return path


def test_a_checkpoint_gives_back_what_was_saved(checkpoint):
    contents = load_checkpoint(checkpoint)
    assert torch.equal(contents["model"]["weight"], torch.arange(2000.0))
    assert (contents["epoch"], contents["names"], contents["best"]) == (3, ["a", "b"], None)


def test_a_file_that_does_not_fit_on_the_disk_is_named_with_the_reason(checkpoint):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=re.escape(f"File too large: '{checkpoint}'")):
            save_checkpoint(checkpoint, {"weight": torch.zeros(100_000), "bias": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(checkpoint)["epoch"] == 3


def test_a_failure_while_writing_leaves_the_file_from_before_and_nothing_else(checkpoint):
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(checkpoint, {"model": {"weight": torch.zeros(2000)}, "broken": Unsaveable()})
    assert load_checkpoint(checkpoint)["epoch"] == 3
    assert os.listdir(checkpoint.parent) == [checkpoint.name]


def test_a_failure_before_the_move_leaves_the_file_from_before(checkpoint, monkeypatch):
    def fail(handle):
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        save_checkpoint(checkpoint, {"epoch": 4})
    assert load_checkpoint(checkpoint)["epoch"] == 3
    assert os.listdir(checkpoint.parent) == [checkpoint.name]


def test_a_file_is_synced_before_it_takes_its_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "a.txt", []
    sync = os.fsync

    def watch(handle):
        seen.append((path.exists(), os.fstat(handle).st_size))
        sync(handle)

    monkeypatch.setattr(os, "fsync", watch)
    write_text(path, "hello")
    assert seen[0] == (False, 5)  # the file, whole, not under its name yet
    assert seen[1][0]  # then the folder, with the name in it
    assert path.read_text(encoding="utf-8") == "hello"


def test_an_interrupted_writer_leaves_no_file(tmp_path):
    def write_half():
        with atomic_writer(tmp_path / "a.bin") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(checkpoint, share):
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match=r"a\.pth is truncated, damaged or not a checkpoint"):
        load_checkpoint(checkpoint)


def test_a_flipped_bit_never_changes_what_is_loaded(checkpoint):
    data, chance = checkpoint.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(data)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        checkpoint.write_bytes(damaged)
        try:
            contents = load_checkpoint(checkpoint)
        except CheckpointError:
            refused += 1
        else:
            assert torch.equal(contents["model"]["weight"], torch.arange(2000.0))
            assert contents["epoch"] == 3
    assert refused > 150


def test_a_checkpoint_of_somebody_else_or_of_another_version_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"model": {}}, path)
    with pytest.raises(CheckpointError, match=r"was not written by vim.train"):
        load_checkpoint(path)
    torch.save({"format": "vimamba", "format_version": 99}, path)
    with pytest.raises(CheckpointError, match="has format version 99, this library reads 1"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*nowhere\.pth"):
        load_checkpoint(tmp_path / "nowhere.pth")


def test_random_numbers_continue_where_the_saved_state_was(tmp_path):
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    np.random.randn()  # leaves a second normal number cached
    save_checkpoint(tmp_path / "a.pth", {"rng": rng_state()})

    def draw():
        return random.random(), np.random.randn(), np.random.rand(), torch.rand(()).item()

    expected = draw()
    draw()
    set_rng_state(load_checkpoint(tmp_path / "a.pth")["rng"])
    assert draw() == expected


def test_weights_give_back_what_was_saved_and_refuse_damage(tmp_path):
    path = tmp_path / "a.safetensors"
    weights = {"a": torch.randn(3, 4).t(), "b": torch.zeros(2, dtype=torch.bfloat16)}
    save_weights(path, weights, {"model": "vim"})
    loaded, metadata = load_weights(path)
    assert metadata == {"model": "vim"}
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is truncated or not a safetensors file"):
        load_weights(path)
    with pytest.raises(FileNotFoundError):
        load_weights(tmp_path / "nowhere.safetensors")


def test_weights_of_another_model_are_refused_with_the_first_that_does_not_fit():
    module = nn.Linear(3, 2)
    good = {name: tensor.clone() for name, tensor in nn.Linear(3, 2).state_dict().items()}
    load_into(module, good, "a.pth")
    assert torch.equal(module.weight, good["weight"])
    with pytest.raises(
        CheckpointError, match=r"a.pth does not fit the model: 'weight' has shape \(2, 4\), .* \(2, 3\)"
    ):
        load_into(module, {**good, "weight": torch.zeros(2, 4)}, "a.pth")
    with pytest.raises(CheckpointError, match="it lacks 'bias'"):
        load_into(module, {"weight": good["weight"]}, "a.pth")
    with pytest.raises(CheckpointError, match="it has 'extra', which the model lacks"):
        load_into(module, {**good, "extra": torch.zeros(1)}, "a.pth")


@pytest.mark.parametrize("read", [load_checkpoint, load_weights, read_checkpoint, load_trained_model])
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_pointer_of_git_lfs_is_called_so(read, name, tmp_path):
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises((CheckpointError, RuntimeError), match=r"a Git LFS pointer .*: run git lfs pull$"):
        read(path if read is not load_trained_model else str(path))
