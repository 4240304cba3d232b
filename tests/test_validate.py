"""`python -m vim.validate`: the figures are exact, on any weights, data and number of processes, and in files."""

from __future__ import annotations

import json
import os

import pytest
import timm
import torch
from PIL import Image

from tests.helpers import assert_refused
from tests.models.test_pretrained import make_original_checkpoint
from tests.processes import run_together
from tests.tiny_runs import read_table, tiny_config, write_image_folder
from vim import validate
from vim.inference.validation import ConfusionCounter
from vim.runtime.distributed import Processes
from vim.training.run_folder import RunFolder
from vim.training.trainer import Trainer

CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox"]
FILES = ["classes.csv", "confusion.csv", "confusion.png", "results.json"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("validate"), CLASSES, {"train": 8, "val": 3})


@pytest.fixture(scope="module")
def run(tmp_path_factory, images):
    """A short run on image files."""
    config = tiny_config(
        epochs=2,
        ema_decay=0.5,
        data__dataset="folder",
        data__path=str(images),
        model__in_chans=3,
        eval_batch_size=4,
        optim__lr=1e-2,
    )
    trainer = Trainer(config, RunFolder(tmp_path_factory.mktemp("run") / "run"))
    trainer.fit()
    return trainer


def results(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def forbid_other_files(folder):
    assert sorted(path.name for path in folder.iterdir()) == FILES


@pytest.mark.parametrize(("weights", "prefix"), [("raw", "val"), ("ema", "ema")])
def test_a_run_gets_the_figures_that_it_had_in_training(run, tmp_path, capsys, weights, prefix):
    last = run.position.history[-1]
    source = str(run.folder.last)
    assert validate.main([source, "--weights", weights, "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    found = results(tmp_path / "out")
    assert found["top1"] == last[f"{prefix}_top1"]
    assert found["top5"] == last[f"{prefix}_top5"]
    assert found["loss"] == pytest.approx(last[f"{prefix}_loss"], rel=1e-9)
    assert (found["count"], found["unreadable"], found["weights"]) == (18, 0, weights)
    out = capsys.readouterr().out
    assert f"top-1 {found['top1']:.3f} %  top-5 {found['top5']:.3f} %" in out
    assert out.endswith(f"files: {tmp_path / 'out'}\n")
    forbid_other_files(tmp_path / "out")


def test_the_files_hold_the_confusion_matrix_and_the_table_of_the_classes(run, images):
    assert validate.main([str(run.folder.path), "--device", "cpu"]) == 0
    folder = run.folder.path / "validation"
    model = run.state.ema.module if results(folder)["weights"] == "ema" else run.model
    if run.position.best["epoch"] != 2:
        model.load_state_dict(timm.models.load_state_dict(str(run.folder.best_weights)))
    expected = torch.zeros(6, 6, dtype=torch.int64)
    model.eval()
    for inputs, labels in run.task.loaders.val:
        with torch.inference_mode():
            for label, guess in zip(labels.tolist(), model(inputs).argmax(1).tolist(), strict=True):
                expected[label, guess] += 1
    matrix = read_table(folder / "confusion.csv")
    assert [row["class \\ guess"] for row in matrix] == CLASSES
    assert [[int(row[name]) for name in CLASSES] for row in matrix] == expected.tolist()
    rows = read_table(folder / "classes.csv")
    assert [row["class"] for row in rows] == CLASSES
    assert [int(row["right"]) for row in rows] == expected.diagonal().tolist()
    assert [int(row["guessed"]) for row in rows] == expected.sum(0).tolist()
    assert all(float(row["top1"]) == pytest.approx(100 * int(row["right"]) / 3) for row in rows)
    for row in rows:
        share = 100 * int(row["right"]) / int(row["guessed"]) if int(row["guessed"]) else None
        assert (float(row["precision"]) if row["precision"] else None) == (share and pytest.approx(share))
    with Image.open(folder / "confusion.png") as picture:
        assert min(picture.size) > 300


def test_guesses_are_counted_by_class():
    torch.manual_seed(0)
    logits, labels = torch.randn(200, 8), torch.randint(0, 7, (200,))
    counter = ConfusionCounter(8, torch.device("cpu"))
    for part in range(0, 200, 30):
        counter(logits[part : part + 30], labels[part : part + 30])
    confusion, of_five = counter.totals(Processes())
    for row in range(8):
        for column in range(8):
            assert confusion[row, column] == ((labels == row) & (logits.argmax(1) == column)).sum()
        ranks = (logits[labels == row] > logits[labels == row][:, row : row + 1]).sum(1)
        assert of_five[row] == (ranks < 5).sum()


def test_other_images_are_matched_by_the_names_of_their_classes(run, tmp_path, capsys):
    write_image_folder(tmp_path / "other", ["cat", "fox"], {"test": 4})
    arguments = ["--path", str(tmp_path / "other"), "--split", "test", "--output", str(tmp_path / "out")]
    assert validate.main([str(run.folder.best_weights), *arguments, "--device", "cpu"]) == 0
    rows = read_table(tmp_path / "out" / "classes.csv")
    assert [int(row["images"]) for row in rows] == [0, 0, 4, 0, 0, 4]
    assert rows[0]["top1"] == ""
    (tmp_path / "other" / "test" / "cat").rename(tmp_path / "other" / "test" / "cow")
    assert validate.main([str(run.folder.best_weights), *arguments, "--device", "cpu"]) == 2
    assert "has a class 'cow' among its held-out images that the 6 classes of the model lack" in capsys.readouterr().err


def test_images_that_cannot_be_read_are_missing_and_it_is_said(run, tmp_path, capsys):
    images = write_image_folder(tmp_path / "images", CLASSES, {"val": 3})
    (images / "val" / "bee" / "1.jpg").write_bytes(b"no image")
    arguments = ["--path", str(images), "--output", str(tmp_path / "out"), "--workers", "1", "--device", "cpu"]
    assert validate.main([str(run.folder.path), *arguments]) == 1
    assert "on 17 images\n1 more images could not be read and are missing" in capsys.readouterr().out
    found = results(tmp_path / "out")
    assert (found["count"], found["unreadable"]) == (17, 1)
    assert [int(row["images"]) for row in read_table(tmp_path / "out" / "classes.csv")] == [3, 2, 3, 3, 3, 3]


ODD = [os.fsdecode(b"caf\xe9"), "$\\frac$", "a,b"]


def test_names_of_classes_need_not_be_text(tmp_path, capsys):
    images = write_image_folder(tmp_path / "images", ODD, {"train": 6, "val": 2})
    (images / "val" / "notes.txt").touch()
    config = tiny_config(data__dataset="folder", data__path=str(images), model__in_chans=3)
    Trainer(config, RunFolder(tmp_path / "run")).fit()
    assert validate.main([str(tmp_path / "run"), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "  on 6 images\n1 file passed over (1 .txt)\nfiles: " in out
    forbid_other_files(tmp_path / "run" / "validation")
    rows = read_table(tmp_path / "run" / "validation" / "classes.csv")
    assert [row["class"] for row in rows] == ["$\\frac$", "a,b", r"caf\udce9"]


def test_the_figures_are_printed_before_anything_can_go_wrong_with_the_files(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert validate.main([str(run.folder.path), "--device", "cpu", "--output", str(tmp_path / "file")]) == 2
    output = capsys.readouterr()
    assert "top-1 " in output.out
    assert output.err.startswith("vim.validate: [Errno 17] File exists")


def test_several_processes_find_the_same_as_one(run, tmp_path):
    source = [str(run.folder.path), "--device", "cpu", "--batch-size", "2"]
    assert validate.main([*source, "--output", str(tmp_path / "one")]) == 0
    assert run_together(3, validate.main, [*source, "--output", str(tmp_path / "three")]) == [0, 0, 0]
    for name in ("classes.csv", "confusion.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
    one, three = results(tmp_path / "one"), results(tmp_path / "three")
    assert three["loss"] == pytest.approx(one["loss"], rel=1e-9)
    assert [three[name] for name in ("top1", "top5", "count")] == [one[name] for name in ("top1", "top5", "count")]


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_a_file_of_the_original_is_evaluated_on_some_of_imagenets_classes(tmp_path, weights):
    torch.manual_seed(0)
    model = timm.create_model("vim_tiny_patch16_224")
    bias = torch.zeros(1000)
    bias[[0, 1]] = torch.tensor([50.0, 40.0])  # every image is a tench, and a goldfish after that
    model.head.bias.data.copy_(bias)
    contents = make_original_checkpoint(model)
    contents["model_ema"] = {**model.state_dict(), "head.bias": bias.roll(1)}  # goldfish, then great white shark
    torch.save(contents, tmp_path / "released.pth")
    images = write_image_folder(tmp_path / "images", ["n01443537", "n01440764"], {"val": 1})
    arguments = ["--model", "vim_tiny_patch16_224", "--path", str(images), "--device", "cpu"]
    arguments += ["--weights", weights, "--output", str(tmp_path / "out")]
    assert validate.main([str(tmp_path / "released.pth"), *arguments]) == 0
    rows = read_table(tmp_path / "out" / "classes.csv")
    assert (len(rows), rows[0]["class"], rows[1]["class"]) == (1000, "n01440764", "n01443537")
    right = {"raw": 0, "ema": 1}[weights]
    assert [row["right"] for row in rows[:2]] == (["1", "0"] if right == 0 else ["0", "1"])
    assert results(tmp_path / "out")["top1"] == 50.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "there is no run folder, checkpoint or timm model '/nowhere'"),
        (["{run}", "--path", "/nowhere"], "data.path must be a folder of images, and '/nowhere' is not a folder"),
        (["{run}", "--split", "test5"], "must have a folder or tar file for the split 'test5'"),
        (["{run}", "--dataset", "digits"], "data.dataset 'digits' has the classes 0, 1, 2"),
        (["{run}", "--device", "gpu"], "device must be"),
        (["{run}/best.safetensors", "--weights", "raw"], "weights must be 'best' for"),
        (["{run}/last.pth", "--model", "vim_tiny_patch16_224"], "does not load into 'vim_tiny_patch16_224'"),
        (["{run}", "--batch-size", "0"], "eval_batch_size must be > 0, got 0"),
    ],
)
def test_a_mistake_ends_in_one_line_and_code_2(run, capsys, arguments, message):
    arguments = [argument.format(run=run.folder.path) for argument in arguments]
    assert_refused(validate, arguments, message, capsys)
