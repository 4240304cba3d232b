"""A run that is carried on notices what has become of its images, and says what it trains on when it starts."""

from __future__ import annotations

import gzip
import os
import shutil

import pytest

from tests.helpers import assert_refused
from tests.tiny_runs import TINY_MODEL, write_image_folder
from vim import train
from vim.checkpoints.io import load_checkpoint

CLASSES = ["ant", "bee", "cow"]


def arguments(images, folder, epochs=1):
    return [
        *("--data.dataset", "folder", "--data.path", str(images), "--output", str(folder), "--device", "cpu"),
        *("--model.img_size", "16", "--model.args", str(TINY_MODEL), "--model.in_chans", "3"),
        *("--batch_size", "4", "--micro_batch_size", "4", "--epochs", str(epochs), "--schedule.warmup_epochs", "0"),
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of images and a run on them, whole."""
    root = tmp_path_factory.mktemp("changes")
    write_image_folder(root / "images", CLASSES, {"train": 4, "val": 2})
    assert train.main(arguments(root / "images", root / "run")) == 0
    return root


@pytest.fixture
def copied(trained, tmp_path, capsys):
    """A copy of both, in another place."""
    shutil.copytree(trained, tmp_path / "copy")
    capsys.readouterr()
    return tmp_path / "copy"


def resumption(copied):
    return ["--resume", str(copied / "run"), "--data.path", str(copied / "images")]


def resume(copied):
    return train.main(resumption(copied))


def test_classes_that_changed_are_refused_by_name(copied, capsys):
    for split in ("train", "val"):
        (copied / "images" / split / "bee").rename(copied / "images" / split / "zebra")
    saved = (copied / "run" / "last.pth").read_bytes()
    assert_refused(train, resumption(copied), "'bee' is gone and 'zebra' is new, and their labels would mean", capsys)
    assert (copied / "run" / "last.pth").read_bytes() == saved


def test_images_that_changed_are_said_aloud_once(copied, capsys):
    assert resume(copied) == 0
    assert "images  " not in capsys.readouterr().out  # moved as a whole, nothing is different
    (copied / "images" / "train" / "ant" / "1.jpg").unlink()
    (copied / "images" / "train" / "bee" / "0.jpg").rename(copied / "images" / "train" / "cow" / "x.jpg")
    (copied / "images" / "val" / "cow" / "0.jpg").unlink()
    assert resume(copied) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("images")]
    assert lines == [
        "images   the training images are not what they were: 1 new (cow/x.jpg (cow))",
        "images   the training images are not what they were: 2 gone (ant/1.jpg (ant), bee/0.jpg (bee))",
        "images   the held-out images are not what they were: 1 gone (cow/0.jpg (cow))",
    ]
    assert resume(copied) == 0
    assert "images  " not in capsys.readouterr().out


def test_a_run_without_a_record_says_so_and_a_damaged_one_is_refused(copied, capsys):
    record = copied / "run" / "images.json.gz"
    whole = record.read_bytes()
    for damaged in (whole[:-20], whole[:20] + b"\xff\xff" + whole[22:], gzip.compress(b"[" * 100_000)):
        record.write_bytes(damaged)
        assert_refused(train, resumption(copied), f"{record} is damaged: ", capsys)
    record.unlink()
    assert resume(copied) == 0
    assert "images   the run has no images.json.gz, so it is unknown whether" in capsys.readouterr().out


def test_the_first_lines_show_the_classes_and_what_is_passed_over(tmp_path, capsys):
    names = [*CLASSES, "doe", "eel", "fox", os.fsdecode(b"gnu\xe9")]
    images = write_image_folder(tmp_path / "images", names, {"train": 2, "val": 1})
    for name in ("train/ant/x.heic", "train/notes.txt", "val/fox/y.heic"):
        (images / name).touch()
    assert train.main(arguments(images, tmp_path / "run")) == 0
    out = capsys.readouterr().out
    assert "14 training images, 7 held out, 7 classes, 3 files passed over (2 .heic, 1 .txt)\n" in out
    assert "\nclasses  ant (2), bee (2), cow (2), doe (2), eel (2), and 2 more\n" in out
    assert load_checkpoint(tmp_path / "run" / "last.pth")["class_names"] == names
