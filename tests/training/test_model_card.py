"""A run's folder for the hub: timm and transformers load it and compute what the run's model computes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.helpers import assert_refused
from tests.tiny_runs import TINY_OPTIONS
from vim import card, train
from vim.inference.predictor import Predictor
from vim.inference.trained_model import load_trained_model


def train_run(folder: Path, in_chans: int) -> Path:
    """Train a tiny model on synthetic images."""
    options = ["--data.dataset", "synthetic", "--data.synthetic_images", "64", "--batch_size", "16"]
    options += ["--micro_batch_size", "16", "--model.in_chans", str(in_chans), "--output", str(folder)]
    assert train.main([*TINY_OPTIONS, *options]) == 0
    return folder


@pytest.fixture(scope="module", params=[1, 3], ids=["grey", "rgb"])
def run(request, tmp_path_factory):
    """A run on synthetic images of one or three channels."""
    return train_run(tmp_path_factory.mktemp("runs") / "tiny", request.param)


def channels(run: Path) -> int:
    """Channels of the run's images."""
    return load_trained_model(str(run)).preprocessing.in_chans


def picture(in_chans: int) -> Image.Image:
    """A picture of another size than the model's."""
    shape = (20, 24) if in_chans == 1 else (20, 24, 3)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def test_the_folder_gives_the_model_back(run, tmp_path, capsys):
    folder = tmp_path / "hub"
    assert card.main([str(run), "--output", str(folder), "--license", "apache-2.0"]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    trained = load_trained_model(str(run))
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, channels(run), 16, 16)
    assert torch.equal(model(images), trained.model.eval()(images))
    text = (folder / "README.md").read_text()
    assert text.startswith("---\ntags:\n")
    for part in (
        "license: apache-2.0",
        "`vim_tiny_patch16_224`",
        "| epoch | top-1 |",
        "pipeline(" if channels(run) == 3 else "AutoImageProcessor",
        "vim.train",
        "`synthetic`",
    ):
        assert part in text
    assert "recipe: digits" in text, "the settings are in the card"
    assert str(run.parent) not in text, "no folder of the machine is"
    settings = json.loads((folder / "config.json").read_text())
    assert settings["label_names"] == list(trained.class_names)
    assert {file.name for file in folder.iterdir()} >= {"README.md", "config.json", "model.safetensors"}


@pytest.mark.slow
def test_transformers_loads_the_folder(run):
    transformers = pytest.importorskip("transformers", reason='needs pip install "vimamba[dense]"')
    assert card.main([str(run)]) == 0
    folder, trained = run / "hub", load_trained_model(str(run))
    predictor = Predictor(trained.model, trained.preprocessing, trained.class_names, torch.device("cpu"))
    image = picture(channels(run))
    expected = predictor.probabilities([image])
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        actual = model(**processor(image, return_tensors="pt")).logits.softmax(1)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert tuple(model.config.id2label.values()) == trained.class_names
    if channels(run) != 3:  # the pipeline makes every image RGB
        return
    classify = transformers.pipeline("image-classification", model=str(folder), device="cpu")
    found = {entry["label"]: entry["score"] for entry in classify(image, top_k=3)}
    best = expected[0].topk(3)
    for index, score in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        assert found[trained.class_names[index]] == pytest.approx(score, abs=1e-5)


@pytest.mark.slow
def test_transformers_trains_saves_and_loads_the_model(run, tmp_path):
    transformers = pytest.importorskip("transformers", reason='needs pip install "vimamba[dense]"')
    pytest.importorskip("accelerate", reason="needs pip install accelerate")
    assert card.main([str(run)]) == 0
    model = transformers.AutoModelForImageClassification.from_pretrained(run / "hub")
    before = model.timm_model.head.weight.detach().clone()
    rng = torch.Generator().manual_seed(0)
    data = [{"pixel_values": torch.randn(channels(run), 16, 16, generator=rng), "labels": i % 10} for i in range(16)]
    settings = transformers.TrainingArguments(
        str(tmp_path / "trainer"), max_steps=8, learning_rate=1e-2, use_cpu=True, report_to=[], save_steps=4,
        per_device_train_batch_size=16, logging_steps=1, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert not torch.equal(model.timm_model.head.weight, before)
    trainer.save_model(str(tmp_path / "saved"))
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
    images = torch.randn(2, channels(run), 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(again(images).logits, model.eval()(images).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/none"], "run must be the folder of a training run"),
        (["{}"], "best.pth"),
        (["RUN", "--output", "{}/file"], "output must be a folder"),
    ],
)
def test_bad_arguments(arguments, message, run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = [argument.replace("RUN", str(run)).format(tmp_path) for argument in arguments]
    assert_refused(card, arguments, message, capsys)
