"""`python -m vim.train` as a user meets it: what it prints, the code it exits with, the files it leaves."""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest

from tests.helpers import assert_refused
from tests.processes import Python
from tests.tiny_runs import TINY_OPTIONS, read_table, write_image_folder
from vim import predict, train
from vim.checkpoints.io import load_checkpoint
from vim.training.optim import Schedule

CONFIGS = Path(__file__).parents[1] / "configs"
SYNTHETIC = ["--data.dataset", "synthetic", "--data.synthetic_images", "48", *TINY_OPTIONS]
TINY_BATCH = ["--batch_size", "16", "--micro_batch_size", "16"]


def rows(folder):
    return read_table(folder / "summary.csv")


def test_training_on_the_digits_ends_with_a_command_that_works(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main([*TINY_OPTIONS, "--log.report", "true"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("digits-")
    out = capsys.readouterr().out
    assert "1,437 training images, 360 held out, 10 classes" in out
    assert f"epoch 1/1  training: loss {float(rows(folder)[0]['train_loss']):.3f}" in out
    best, files, report, following = out.splitlines()[-4:]
    assert best.startswith("best: ")
    assert files == f"files: runs/{folder.name}"
    assert report == f"report: runs/{folder.name}/report.html"
    top1 = float(best.split()[1])
    assert f"<dd>{top1:.2f} %</dd>" in (folder / "report.html").read_text(encoding="utf-8")
    assert following.startswith(f"next: python -m vim.predict runs/{folder.name} runs/{folder.name}/samples/0_")
    assert predict.main(shlex.split(following)[4:]) == 0
    assert capsys.readouterr().out.count(" %") == 5


@pytest.mark.parametrize(
    "problem",
    [
        ValueError("odd"),
        FileNotFoundError("the images\nare gone"),
        RuntimeError("out of memory"),
        ModuleNotFoundError("a report needs jinja2"),
        KeyboardInterrupt(),
    ],
    ids=lambda problem: type(problem).__name__,
)
def test_a_report_that_fails_is_one_line_and_the_run_is_complete(tmp_path, monkeypatch, capsys, problem):
    def fail(run, *_, **__):
        assert (run / "best.safetensors").exists(), "the weights come first"
        raise problem

    monkeypatch.setattr("vim.explain.report.write_report", fail)
    folder = tmp_path / "run"
    assert train.main([*SYNTHETIC, *TINY_BATCH, "--log.report", "true", "--output", str(folder)]) == 0
    best, _, report, following = capsys.readouterr().out.splitlines()[-4:]
    reason = " ".join(str(problem).split()) or "KeyboardInterrupt"
    assert report == f"report: not written ({reason}); try again with: python -m vim.report {folder}"
    assert best.startswith("best: ")
    assert following.startswith("next: ")
    assert load_checkpoint(folder / "last.pth")["position"]["epoch"] == 1


def test_a_report_needs_no_package_of_the_explain_extra(tmp_path, monkeypatch, capsys):
    for name in ("pytorch_grad_cam", "captum"):
        monkeypatch.setitem(sys.modules, name, None)  # its import fails
    folder = tmp_path / "run"
    assert train.main([*SYNTHETIC, *TINY_BATCH, "--log.report", "true", "--output", str(folder)]) == 0
    assert f"report: {folder / 'report.html'}\n" in capsys.readouterr().out
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jinja2" else find(name))
    assert train.main(["--resume", str(folder), "--log.report", "true"]) == 0
    assert "report: not written (a report needs jinja2: pip install" in capsys.readouterr().out


def test_without_a_report_none_is_named(tmp_path, capsys):
    assert train.main([*SYNTHETIC, *TINY_BATCH, "--log.report", "false", "--output", str(tmp_path / "run")]) == 0
    assert "report:" not in capsys.readouterr().out
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.lrr", "1"], "unknown setting optim.lrr: did you mean optim.lr?"),
        (["--model.args.dept", "3"], "unexpected keyword argument 'dept': did you mean 'depth'?"),
        (["--data.dataset", "folder", "--data.path", "/nowhere"], "'/nowhere' is not a folder"),
        (["--resume", "/nowhere"], "--resume must name the folder of a run"),
        (["--device", "gpu"], "device must be 'auto', 'cpu'"),
        (
            ["--model.name", "vit_tiny_patch16_224", "--model.args", "{embed_dim: 32}"],
            "cannot be created with these model.args: ",
        ),
        (
            ["--model.name", "vit_tiny_patch16_224", "--model.args", "{global_pool: x}"],
            "cannot be created with these model.args: ",
        ),
        (
            ["--model.name", "convnext_atto", "--model.args", "{depths: [1]}"],
            "cannot be created with these model.args: ",
        ),
        (
            ["--model.name", "levit_128s", "--model.args", "{}", "--model.img_size", "20"],
            "model.name 'levit_128s' does not take images of model.img_size (20, 20): ",
        ),
        (["--model.img_size", "31"], "img_size must be covered by patches of patch_size = (8, 8)"),
        (
            ["--model.args.dynamic_img_size", "true", "--model.img_size", "32", "--progressive.start_size", "20"],
            "start_size must be a multiple of progressive.multiple = 16, got 20",
        ),
        (
            [
                *("--progressive.start_size", "16", "--progressive.multiple", "4"),
                "--model.args.dynamic_img_size",
                "true",
            ],
            "which does not take images of (28, 28) (img_size must be covered by patches",
        ),
    ],
)
def test_a_mistake_ends_in_one_line_and_code_2_before_anything_is_written(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert_refused(train, arguments, message, capsys)
    assert list(tmp_path.iterdir()) == []


def test_without_the_packages_of_training_the_install_line_is_printed(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert_refused(train, [], "matplotlib", capsys)
    assert_refused(train, [], 'pip install "vimamba[train]"', capsys)


def test_a_loss_that_explodes_ends_in_one_line_and_code_1(tmp_path, capsys):
    options = ["--optim.lr", "1e30", "--optim.clip_grad", "null", "--epochs", "3", "--output", str(tmp_path / "run")]
    assert train.main([*SYNTHETIC, *TINY_BATCH, *options]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("vim.train: no step of epoch 2 had a finite loss and gradient")
    assert load_checkpoint(tmp_path / "run" / "last.pth")["position"]["epoch"] == 1


def test_a_folder_that_cannot_be_written_ends_in_one_line_and_code_1(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert train.main([*SYNTHETIC, *TINY_BATCH, "--output", str(tmp_path / "file" / "run")]) == 1
    error = capsys.readouterr().err
    assert error == f"vim.train: [Errno 20] Not a directory: '{tmp_path / 'file' / 'run'}'\n"


def train_until(folder, step, interrupt):
    """Begin a run of three epochs that is interrupted before a step; return the exit code."""
    choose = Schedule.set

    def choose_or_interrupt(self, epoch, done):
        if done == step:
            interrupt()
        return choose(self, epoch, done)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Schedule, "set", choose_or_interrupt)
        return train.main([*SYNTHETIC, *TINY_BATCH, "--epochs", "3", "--output", str(folder)])


def test_an_interrupted_run_says_how_to_carry_on_and_that_works(tmp_path, capsys):
    folder = tmp_path / "run"

    def press_control_c():
        raise KeyboardInterrupt

    assert train_until(folder, 3, press_control_c) == 130
    error = capsys.readouterr().err
    assert f"interrupted after step 3; carry on with: python -m vim.train --resume {folder}" in error
    assert len(rows(folder)) == 1
    for _ in range(2):  # the second time it is complete: nothing to do, the figures stand
        assert train.main(["--resume", str(folder)]) == 0
        assert [row["epoch"] for row in rows(folder)] == ["1", "2", "3"]


def test_a_run_that_gets_sigterm_saves_and_exits_with_0(tmp_path, capsys):
    folder = tmp_path / "run"
    assert train_until(folder, 4, lambda: os.kill(os.getpid(), signal.SIGTERM)) == 0
    last_line = capsys.readouterr().out.splitlines()[-1]
    carry_on = f"python -m vim.train --resume {folder}"
    assert last_line == f"stopped by SIGTERM after step 5, and saved; carry on with: {carry_on}"
    assert train.main(["--resume", str(folder)]) == 0
    assert "(carried on after step 5)" in capsys.readouterr().out
    assert [row["step"] for row in rows(folder)] == ["3", "6", "9"]


def test_a_run_that_torchrun_starts_once_more_carries_on(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    arguments = [*SYNTHETIC, *TINY_BATCH, "--output", str(folder)]
    assert train.main(arguments) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train.main(arguments) == 0
    assert "(carried on after step 3)" in capsys.readouterr().out
    assert train.main([*SYNTHETIC, *TINY_BATCH]) == 2
    assert "--output must name the folder of a run that torchrun restarts" in capsys.readouterr().err


def test_the_imagenet_recipe_runs_on_a_folder_of_jpegs(tmp_path, capsys):
    """The recipe as it is, with its augmentation and accumulation, but a small model and few images."""
    images = write_image_folder(tmp_path / "images", ["n01440764", "n01443537", "n02007558"], {"train": 16, "val": 3})
    folder = tmp_path / "run"
    small = ["--model.img_size", "32", "--model.args", "{embed_dim: 16, depth: 2, d_state: 4}", "--data.workers", "0"]
    short = ["--epochs", "2", "--schedule.warmup_epochs", "1", "--batch_size", "16", "--micro_batch_size", "4"]
    recipe = ["--config", str(CONFIGS / "vim_tiny_in1k.yaml"), "--data.path", str(images)]
    assert train.main([*recipe, *small, *short, "--device", "cpu", "--output", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "48 training images, 9 held out, 3 classes" in out
    assert "batch 16 = 4 x 4, adamw at learning rate 1.5625e-05" in out  # 5e-4 * 16 / 512
    assert [(row["epoch"], row["step"]) for row in rows(folder)] == [("1", "3"), ("2", "6")]
    assert rows(folder)[0]["lr"] == rows(folder)[1]["lr"] == "1e-06"  # the schedule is an epoch late
    contents = load_checkpoint(folder / "last.pth")
    assert contents["class_names"] == ["n01440764", "n01443537", "n02007558"]
    assert contents["config"]["augment"]["repeats"] == 3
    following = shlex.split(out.splitlines()[-1])
    assert following[-1] == str(images / "val" / "n01440764" / "0.jpg")
    assert predict.main(following[4:]) == 0
    assert "n01440764 tench, Tinca tinca" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_a_run_goes_on_when_nobody_reads_its_output(tmp_path, kind):
    """`| head`, or a terminal that is closed under a run which ignores the signal: the files are what matters."""
    reader, writer = os.pipe() if kind == "pipe" else os.openpty()
    words = ["-m", "vim.train", *SYNTHETIC, *TINY_BATCH, "--output", tmp_path / "run"]
    python = Python(*words, stdout=writer, stderr=writer)
    os.close(writer)
    os.close(reader)
    python.communicate()
    assert python.returncode == 0
    assert len(rows(tmp_path / "run")) == 1
    assert load_checkpoint(tmp_path / "run" / "last.pth")["position"]["epoch"] == 1
