"""The task `detection`: a run from settings to files, resuming, several processes, and settings it refuses."""

from __future__ import annotations

import csv
import importlib.util
import json
import math

import pytest
import torch
from PIL import Image
from rich.console import Console

from tests.coco_folder import annotation, plain_objects, write_split
from tests.processes import run_together
from tests.tiny_runs import TINY_MODEL, change, tiny_config
from tests.training.test_trainer import same, train_until
from vim import predict, validate
from vim.checkpoints.io import load_checkpoint
from vim.data.coco_masks import decode_mask
from vim.explain.report import write_report
from vim.inference.object_finder import ObjectFinder
from vim.inference.trained_model import load_trained_model
from vim.runtime.distributed import Processes, join_processes
from vim.tasks.detection import DetectionTask
from vim.training.run_folder import RunFolder
from vim.training.trainer import Trainer

SMALL_HEADS = {
    "channels": 8,
    "anchor_scale": 4.0,
    "anchor_samples": 16,
    "proposals": 20,
    "box_samples": 16,
    "head_convolutions": 1,
    "head_features": 8,
    "jitter": (0.5, 1.5),
    "score_threshold": 0.0,
    "max_detections": 10,
}


def config_for(path, **changes):
    settings = {
        "task": "detection",
        "model__img_size": 32,
        "model__in_chans": 3,
        "model__args": TINY_MODEL,
        "data__dataset": "coco",
        "data__path": str(path),
        "data__train_split": "train2017",
        "data__val_split": "val2017",
        "augment__hflip": 0.5,
        "loss__label_smoothing": 0.0,
        "batch_size": 4,
        "micro_batch_size": 2,
        "optim__lr": 1e-3,
        **{f"detection__{name}": value for name, value in SMALL_HEADS.items()},
    }
    return tiny_config(**settings | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    objects = [*plain_objects(7), annotation(0, 3, (1, 1, 30, 20), iscrowd=1), annotation(10, 3, (5, 5, 0, 9))]
    write_split(root, "train2017", objects, images=8)  # the last has no objects
    return write_split(root, "val2017", plain_objects(5, seed=1), images=5)


def train(config, folder):
    with join_processes() as processes:
        trainer = Trainer(config, RunFolder(folder), Console(quiet=True), processes)
        trainer.resume()
        trainer.fit()
        weights = {name: tensor.numpy() for name, tensor in trainer.model.state_dict().items()}
        return trainer.position.history, weights


@pytest.fixture(scope="module")
def run(tmp_path_factory, folder):
    """The folder of a run of one epoch, and its history."""
    path = tmp_path_factory.mktemp("detection") / "run"
    return path, train(config_for(folder, ema_decay=None), path)[0]


@pytest.mark.parametrize("heads", ["mask_rcnn", "cascade"])
def test_a_run_writes_figures_curves_pictures_and_weights(tmp_path, folder, heads):
    config = config_for(folder, detection__heads=heads)
    lines = []

    class Lines(Console):
        def print(self, *text, **options):
            lines.extend(map(str, text))

    run = RunFolder(tmp_path / "run")
    best = Trainer(config, run, Lines()).fit()
    assert best.keys() == {"epoch", "weights", "box_ap50", "box_ap", "mask_ap"}
    with run.summary.open() as file:
        (row,) = csv.DictReader(file)
    for name in ("val_box_ap", "val_box_ap75", "val_mask_ap50", "ema_mask_ap", "train_proposals_loss"):
        assert math.isfinite(float(row[name]))
    parts = [float(row[f"train_{part}_loss"]) for part in ("proposals", "classes", "boxes", "masks")]
    assert sum(parts) == pytest.approx(float(row["train_loss"]), rel=1e-5)
    assert row["val_loss"] == ""
    text = "\n".join(lines)
    assert "8 training images with objects, 5 held out, 3 classes" in text
    assert "objects  training: 1 images without objects, 1 crowds, 1 boxes without area" in text
    for picture in ("curves.png", "predictions.png"):
        Image.open(run.path / picture).load()
    saved = load_checkpoint(run.best)
    assert saved["class_names"] == ["ant", "bee", "cat"]
    report = write_report(run.path).read_text(encoding="utf-8")
    assert f"<dt>held out, mask AP</dt><dd>{best['mask_ap']:.2f} %</dd>" in report
    assert run.best_weights.exists()


def test_boxes_alone(tmp_path, folder):
    history, _ = train(config_for(folder, detection__masks=False, ema_decay=None), tmp_path / "run")
    assert history[0]["val_mask_ap"] is None
    assert history[0]["train_masks_loss"] == 0
    assert history[0]["val_box_ap"] is not None


def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(tmp_path, folder):
    config = config_for(folder, epochs=2, save__steps=1, model__drop_path_rate=0.5, detection__heads="cascade")
    train(config, tmp_path / "whole")
    expected = load_checkpoint(tmp_path / "whole" / "last.pth")
    for step in (1, 3):  # of four: in the first epoch and in the second
        broken = tmp_path / f"broken {step}"
        train_until(Trainer(config, RunFolder(broken), Console(quiet=True)), step)
        train(config, broken)
        got = load_checkpoint(broken / "last.pth")
        assert same({**expected, "position": None}, {**got, "position": None})
        for name in ("val_box_ap", "val_mask_ap", "train_loss"):
            rows = zip(expected["position"]["history"], got["position"]["history"], strict=True)
            assert all(before[name] == after[name] for before, after in rows)


def test_two_processes_take_the_steps_of_one(tmp_path, folder):
    config = config_for(folder, epochs=2, ema_decay=None, detection__heads="cascade")
    history, weights = train(config, tmp_path / "one")
    for two_history, two_weights in run_together(2, train, config, tmp_path / "two"):
        for name, expected in weights.items():
            found = torch.from_numpy(two_weights[name])
            torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-5, rtol=1e-5, msg=name)
        for row, two in zip(history, two_history, strict=True):
            assert two["train_loss"] == pytest.approx(row["train_loss"], rel=1e-5)
            assert two["train_boxes_loss"] == pytest.approx(row["train_boxes_loss"], rel=1e-4, abs=1e-6)


def test_unreadable_images_are_counted(tmp_path):
    objects = plain_objects(6)
    write_split(tmp_path, "train2017", objects, images=6)
    root = write_split(tmp_path, "val2017", objects, images=6)
    (root / "train2017" / "1.png").unlink()
    (root / "val2017" / "2.png").write_bytes(b"")
    history, _ = train(config_for(root, batch_size=6, micro_batch_size=3), tmp_path / "run")
    assert history[0]["train_unreadable"] >= 1
    assert history[0]["val_unreadable"] == 1


def test_losses_are_a_function_of_the_place_of_a_batch(folder):
    task = DetectionTask(config_for(folder), torch.device("cpu"), Processes())
    torch.manual_seed(0)
    model = task.build_model(False).train()
    batch = next(task.batches(0, 0))
    first = task.training_loss(model, batch)[0]
    torch.rand(3)
    assert torch.equal(task.training_loss(model, batch)[0], first)
    assert not torch.equal(task.training_loss(model, batch._replace(place=(0, 1)))[0], first)


def test_scenes_of_digits_are_written_as_samples(tmp_path):
    config = config_for(None, data__dataset="digit_scenes", data__path=None, detection__scenes=8)
    task = DetectionTask(config, torch.device("cpu"), Processes())
    task.write_samples(tmp_path / "samples")
    assert len(list((tmp_path / "samples").glob("*.png"))) == 2
    assert task.example_image() is None


def test_a_checkpoint_of_other_classes_is_refused(folder):
    task = DetectionTask(config_for(folder), torch.device("cpu"), Processes())
    task.load_state_dict({"class_names": ["ant", "bee", "cat"]})
    with pytest.raises(ValueError, match="classes of the data"):
        task.load_state_dict({"class_names": ["ant", "bee"]})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("augment__mixup", 0.2),
        ("augment__vflip", 0.5),
        ("augment__erase_prob", 0.1),
        ("loss__label_smoothing", 0.1),
        ("compile", True),
    ],
)
def test_settings_that_detection_does_not_have_are_refused(folder, name, value):
    with pytest.raises(ValueError, match=f"{name.replace('__', '.')} must be off for task 'detection'"):
        DetectionTask(change(config_for(folder), **{name: value}), torch.device("cpu"), Processes())


def test_validate_and_predict_take_a_run(tmp_path, run, capsys):
    path, history = run
    assert validate.main([str(path), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert f"box AP {history[0]['val_box_ap']:.3f} %" in shown
    assert "on 5 images" in shown
    results = json.loads((path / "validation" / "results.json").read_text())
    for name in ("box_ap", "box_ap50", "mask_ap", "mask_ap75"):
        assert results[name] == pytest.approx(history[0][f"val_{name}"], abs=1e-6)
    Image.open(path / "validation" / "predictions.png").load()

    (tmp_path / "images" / "again").mkdir(parents=True)
    for name in ("a.png", "again/a.png"):
        Image.new("L", (70, 50)).save(tmp_path / "images" / name)
    (tmp_path / "images" / "broken.png").write_bytes(b"")
    arguments = [str(path), str(tmp_path / "images"), "--output", str(tmp_path / "found"), "--device", "cpu"]
    assert predict.main(arguments) == 1
    captured = capsys.readouterr()
    assert "broken.png is skipped" in captured.err
    assert f"a.png -> {tmp_path / 'found' / 'a_objects.png'}" in captured.out
    files = sorted(path.name for path in (tmp_path / "found").iterdir())
    assert files == ["a-2_objects.json", "a-2_objects.png", "a_objects.json", "a_objects.png"]
    assert Image.open(tmp_path / "found" / "a_objects.png").size == (70, 50)


def test_found_objects_are_written_in_coco_s_format(tmp_path, folder, run):
    finder = ObjectFinder(load_trained_model(str(run[0])), torch.device("cpu"))
    image = folder / "val2017" / "0.png"
    (found,) = finder.write_files([image], tmp_path / "found", score=0.0)
    results = json.loads((tmp_path / "found" / "0_objects.json").read_text())
    assert len(results) == len(found.objects) > 0
    scores = [result["score"] for result in results]
    assert scores == sorted(scores, reverse=True)
    for result in results:
        assert result["category"] in ("ant", "bee", "cat")
        mask = decode_mask(result["segmentation"], (32, 48))
        left, top, width, height = result["bbox"]
        assert width > 0 < height
        rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
        if len(rows):
            assert rows.min() >= top - 2
            assert columns.max() <= left + width + 2


def test_a_model_of_another_task_is_refused_by_name(run):
    with pytest.raises(ValueError, match=r"must be of task 'classification'.*of task 'detection'"):
        load_trained_model(str(run[0])).check_task("classification")


def test_validation_on_other_categories_is_refused(tmp_path, run, capsys):
    other = write_split(tmp_path / "other", "val2017", [], categories=[{"id": 3, "name": "ant"}])
    assert validate.main([str(run[0]), "--path", str(other), "--device", "cpu"]) == 2
    assert "must be the classes of the model: 'bee', 'cat' are gone" in capsys.readouterr().err


def test_packages_that_are_missing_are_named_before_the_run(folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "faster_coco_eval" else find(name))
    with pytest.raises(ModuleNotFoundError, match=r'needs faster_coco_eval: pip install "vimamba\[dense\]"'):
        DetectionTask(config_for(folder), torch.device("cpu"), Processes())
