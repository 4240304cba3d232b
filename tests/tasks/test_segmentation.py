"""The task `segmentation`: it learns pairs of a user's, resumes to the bit, and its runs are evaluated and used."""

from __future__ import annotations

import base64
import csv
import json
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console

from tests.processes import Python, run_together
from tests.tiny_runs import TINY_SEGMENTER, tiny_config, write_image_folder, write_pairs
from tests.training.test_trainer import same, train_until
from vim import predict, validate
from vim.checkpoints.io import load_checkpoint
from vim.data.mask_pairs import FilePairs
from vim.data.masks import NO_CLASS
from vim.explain.report import write_report
from vim.inference.predictor import load_predictor
from vim.inference.trained_model import load_trained_model
from vim.runtime.distributed import Processes, join_processes
from vim.tasks.registry import open_task
from vim.tasks.segmentation import SegmentationTask, check_settings
from vim.tasks.task import Batch
from vim.training.run_folder import RunFolder
from vim.training.trainer import Trainer

CPU = torch.device("cpu")
CLASSES = ("ground", "wall", "sky")


def config_of(pairs, **changes):
    data = {"data__dataset": "pairs", "data__path": str(pairs), "segmentation__classes": CLASSES}
    return tiny_config(**{**TINY_SEGMENTER, **data, "optim__lr": 1e-2, "loss__label_smoothing": 0.0, **changes})


def make_trainer(config, folder, processes=None):
    return Trainer(config, RunFolder(folder), Console(quiet=True), processes)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), {"train": 16, "val": 5})


@pytest.fixture(scope="module")
def run(tmp_path_factory, pairs):
    """A run long enough to learn stripes by their colours."""
    config = config_of(pairs, epochs=25, ema_decay=0.9, eval_batch_size=2)
    trainer = make_trainer(config, tmp_path_factory.mktemp("run") / "run")
    trainer.fit()
    return trainer


def test_a_run_learns_masks_and_leaves_its_figures_and_pictures(run):
    best = run.position.best
    assert best["miou"] > 80
    with open(run.folder.summary, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"train_aacc", "val_miou", "val_macc", "val_aacc", "val_loss", "ema_miou"} <= rows[0].keys()
    assert max(float(row[key]) for row in rows for key in ("val_miou", "ema_miou")) == best["miou"]
    assert float(rows[-1]["train_aacc"]) > 80
    for name in ("curves.png", "predictions.png"):
        assert (run.folder.path / name).read_bytes().startswith(b"\x89PNG")
    assert run.example_image().endswith("images/val/0.png")


def test_the_report_shows_the_best_figures_and_the_predictions(run, tmp_path):
    text = write_report(run.folder.path, tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"<dt>held out, mIoU</dt><dd>{run.position.best['miou']:.2f} %</dd>" in text
    assert base64.b64encode((run.folder.path / "predictions.png").read_bytes()).decode("ascii") in text
    assert "From left to right: the held-out image, its truth, and what the model predicts." in text
    assert "most often taken for" not in text


def test_the_run_is_described(run):
    assert run.task.describe_data()[0].endswith("16 training images with masks, 5 held out, 3 classes")
    assert run.task.describe_data()[1] == "classes  ground, wall, sky"
    assert run.task.describe_best({"miou": 87.654}) == "mIoU 87.65 % on the held-out images"


def test_validation_repeats_the_figures_of_the_run_and_writes_tables(run, tmp_path, capsys):
    folder = tmp_path / "validation"
    assert validate.main([str(run.folder.path), "--output", str(folder)]) == 0
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["miou"] == pytest.approx(run.position.best["miou"], abs=1e-9)
    assert results["count"] == 5
    assert f"mIoU {results['miou']:.3f} %" in capsys.readouterr().out
    names = ["classes.csv", "confusion.csv", "confusion.png", "predictions.png", "results.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    with open(folder / "classes.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(CLASSES)
    assert np.mean([float(row["iou"]) for row in rows]) == pytest.approx(results["miou"])


def test_validation_counts_the_objects_of_a_set_that_tells_them_apart(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(FilePairs, "instances", lambda pairs, index: pairs.read(index)[1], raising=False)
    assert validate.main([str(run.folder.path), "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["true"] == 10  # two stripes beside the ground in each image
    assert 0 <= results["matched"] <= results["found"]
    assert f"instance AP50 {results['instance_ap50']:.3f} %" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["best.pth", "best.safetensors"])
def test_prediction_writes_a_mask_for_an_image_of_any_size(run, pairs, tmp_path, capsys, file):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    original = Image.open(pairs / "images/val/1.png")
    original.save(photographs / "same.png")
    original.resize((90, 61)).save(photographs / "large.png")
    (photographs / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    assert predict.main([str(run.folder.path / file), str(photographs), "--output", str(out)]) == 1
    captured = capsys.readouterr()
    assert "broken.png is skipped" in captured.err
    assert "same_mask.png" in captured.out
    mask = Image.open(out / "same_mask.png")
    assert mask.mode == "P"
    truth = np.asarray(Image.open(pairs / "masks/val/1.png"))
    assert (np.asarray(mask) == truth).mean() > 0.8
    assert Image.open(out / "large_mask.png").size == Image.open(out / "large_overlay.png").size == (90, 61)


def test_commands_for_classification_refuse_the_run(run):
    with pytest.raises(ValueError, match=r"must be of task 'classification', and .* is of task 'segmentation'"):
        load_predictor(str(run.folder.path))


def test_a_run_that_stops_anywhere_ends_as_an_unbroken_one_to_the_bit(pairs, tmp_path):
    random = {"model__drop_path_rate": 0.2, "segmentation__photometric": True, "augment__hflip": 0.5}
    config = config_of(pairs, epochs=2, save__steps=1, ema_decay=0.9, micro_batch_size=2, **random)
    whole = make_trainer(config, tmp_path / "whole")
    whole.fit()
    for death in (1, 6):  # of eight steps: in the first epoch and in the second
        folder = tmp_path / f"broken {death}"
        train_until(make_trainer(config, folder), death)
        resumed = make_trainer(config, folder)
        resumed.resume()
        assert resumed.position.step == death
        resumed.fit()
        ends = [load_checkpoint(RunFolder(path).last) for path in (folder, tmp_path / "whole")]
        assert same(*ends), death


def fit(config, folder):
    """Train in the processes of this run; return the history and the weights."""
    with join_processes() as processes:
        trainer = make_trainer(config, folder, processes)
        trainer.fit()
        return trainer.position.history, {name: t.numpy() for name, t in trainer.model.state_dict().items()}


def test_two_processes_take_the_steps_of_one(pairs, tmp_path):
    config = config_of(pairs, epochs=2, micro_batch_size=2, segmentation__dropout=0.0, optim__lr=1e-3)
    history, weights = fit(config, tmp_path / "one")
    for two_history, two_weights in run_together(2, fit, config, tmp_path / "two"):
        for name, expected in weights.items():
            np.testing.assert_allclose(two_weights[name], expected, atol=1e-5, rtol=1e-4, err_msg=name)
        for row, two in zip(history, two_history, strict=True):
            assert two["train_loss"] == pytest.approx(row["train_loss"], rel=1e-5)
            assert two["val_miou"] == pytest.approx(row["val_miou"], abs=0.1)
            assert two["val_loss"] == pytest.approx(row["val_loss"], rel=1e-4)


def test_the_loss_is_the_mean_over_all_pixels_with_the_auxiliary_head_at_its_weight(pairs):
    task = open_task(config_of(pairs, segmentation__dropout=0.0), CPU, Processes())
    assert isinstance(task, SegmentationTask)
    model = task.build_model(starting_weights=True)
    batch = next(task.batches(0, 0))
    loss, counts = task.training_loss(model, batch)
    assert (batch.targets == NO_CLASS).any()  # small images were padded
    main, aux = (
        F.cross_entropy(
            F.interpolate(logits, (32, 32), mode="bilinear"), batch.targets, ignore_index=NO_CLASS, reduction="sum"
        )
        for logits in model(batch.images)
    )
    assert loss.item() == pytest.approx((main + 0.4 * aux).item() / batch.targets.numel(), rel=1e-5)
    assert counts[1] == (batch.targets != NO_CLASS).sum()


def test_unreadable_pairs_are_replaced_in_training_and_counted_at_evaluation(tmp_path):
    root = write_pairs(tmp_path / "pairs", {"train": 8, "val": 4})
    for name in ("images/train/3.png", "masks/val/2.png"):
        (root / name).write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1 of 8 checked training pairs do not fit: .*3.png"):
        open_task(config_of(root), CPU, Processes())
    trainer = make_trainer(config_of(root, segmentation__checked=0), tmp_path / "run")
    trainer.fit()
    row = trainer.position.history[0]
    assert (row["train_unreadable"] >= 1, row["val_unreadable"]) == (True, 1)


def test_a_released_classifier_starts_a_backbone_without_its_class_token_at_another_size(pairs, tmp_path):
    images = write_image_folder(tmp_path / "images", ["ant", "bee"], {"train": 8, "val": 2}, (20, 20))
    of_model = {**TINY_SEGMENTER["model__args"], "cls_position": "middle"}
    folder = {"data__dataset": "folder", "data__path": str(images), "model__in_chans": 3, "model__args": of_model}
    make_trainer(tiny_config(**folder), tmp_path / "classifier").fit()
    start = str(tmp_path / "classifier" / "best.safetensors")
    task = open_task(config_of(pairs, model__checkpoint=start), CPU, Processes())
    weights = task.build_model(starting_weights=True).state_dict()
    trained = load_trained_model(start).model.state_dict()
    name = "layers.0.mixer.in_proj.weight"
    assert torch.equal(weights[f"backbone.model.{name}"], trained[name])
    assert weights["backbone.model.pos_embed"].shape == (1, 16, 16)
    assert trained["pos_embed"].shape == (1, 5, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment__mixup": 0.2}, "augment.mixup must be off for task 'segmentation', .* got 0.2"),
        ({"augment__repeats": 3}, "augment.repeats must be 0 .* see segmentation.repeats"),
        ({"model__name": "deit_tiny_patch16_224", "model__args": {}}, "model.name must be a Vision Mamba"),
        ({"data__dataset": "digits", "data__path": None}, "data.dataset must be hfds/NAME or one of .* got 'digits'"),
        ({"segmentation__classes": ()}, "segmentation.classes must name the classes"),
        ({"segmentation__classes": ("a", "b")}, "its mask has the value 2, and must have 0 to 1"),
        ({"segmentation__blocks": (0, 1, 2, 3)}, "blocks must be four of 0 to 1"),
        ({"model__num_classes": 4}, "model.num_classes must be null or the number of classes, 3, got 4"),
    ],
)
def test_settings_that_do_not_fit_are_named(pairs, changes, message):
    with pytest.raises(ValueError, match=message):
        open_task(config_of(pairs, **changes), CPU, Processes()).build_model(starting_weights=False)


def test_batch_norm_needs_several_images_and_one_process_on_a_cpu(pairs):
    settings = config_of(pairs, segmentation__norm="batch", batch_size=2, micro_batch_size=1)
    with pytest.raises(ValueError, match=r"micro_batch_size must be >= 2 for segmentation.norm 'batch'"):
        check_settings(settings, CPU, Processes())
    with pytest.raises(ValueError, match=r"segmentation.norm must be 'group' for several processes on a CPU"):
        check_settings(settings, CPU, Processes(rank=0, size=2, local_rank=0))


def test_classes_come_from_a_file_beside_the_images(tmp_path):
    root = write_pairs(tmp_path / "pairs", {"train": 4, "val": 1})
    (root / "classes.txt").write_text("grass\nsoil\nwater\n")
    assert open_task(config_of(root, segmentation__classes=()), CPU, Processes()).state_dict() == {
        "class_names": ["grass", "soil", "water"]
    }


def test_ade20k_counts_classes_from_1_and_leaves_0_out(tmp_path):
    layout = ("images/{}", "annotations/{}")
    root = write_pairs(tmp_path / "ade", {"training": 4, "validation": 1}, layout=layout, values=(0, 1, 150))
    task = open_task(config_of(root, data__dataset="ade20k", segmentation__classes=()), CPU, Processes())
    assert len(task.class_names) == 150
    batch = next(task.batches(0, 0))
    assert set(batch.targets.unique().tolist()) <= {0, 149, NO_CLASS}
    assert isinstance(batch, Batch)


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="this system has no SIGPIPE")
def test_all_masks_are_written_when_nobody_reads_the_lines(run, pairs, tmp_path):
    images, output = pairs / "images" / "val", tmp_path / "masks"
    reader, writer = os.pipe()
    os.close(reader)
    words = ["-m", "vim.predict", run.folder.path, images, "--device", "cpu", "--output", output]
    python = Python(*words, stdout=writer)
    os.close(writer)
    assert "BrokenPipe" not in python.communicate()[1]
    assert len(list(output.glob("*_mask.png"))) == 5
