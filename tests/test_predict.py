"""`python -m vim.predict`: the model's own answer for a file, a folder, and files that are no images."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import weakref
from collections import Counter
from contextlib import redirect_stdout

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.helpers import assert_refused
from tests.processes import Python
from tests.tiny_runs import change
from vim import predict
from vim.checkpoints.io import CheckpointError, save_weights
from vim.config.load import config_to_dict
from vim.config.schema import TrainConfig
from vim.inference import predictor as predictor_module
from vim.inference.predictor import describe_classes, list_images, load_predictor
from vim.models.starting_weights import METADATA_KEY
from vim.training.run_folder import RunFolder
from vim.training.trainer import Trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trainer that has spent two epochs on the digits."""
    config = change(
        TrainConfig(),
        epochs=2,
        device="cpu",
        ema_decay=0.5,
        model__img_size=16,
        model__args={"patch_size": 4, "embed_dim": 24, "depth": 1, "d_state": 4},
        optim__lr=1e-2,
        schedule__warmup_epochs=0,
    )
    trainer = Trainer(config, RunFolder(tmp_path_factory.mktemp("predict") / "run"))
    trainer.fit()
    return trainer


@pytest.fixture
def held_out(run, tmp_path):
    """The first held-out images as files, and their labels."""
    dataset = run.task.loaders.sets.val
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(70):
        Image.fromarray(dataset.images[index, 0].numpy()).save(folder / f"{index:03d}.png")
    return folder, dataset.labels[:70]


def test_files_get_the_probabilities_that_the_model_gives_in_evaluation(run, held_out):
    folder, _ = held_out
    predictor = load_predictor(str(run.folder.best))
    results = list(predictor.predict_files(list_images(folder), topk=10))
    images = next(iter(run.task.loaders.val))[0][:64]
    with torch.inference_mode():
        expected = predictor.model(images).softmax(1)
    assert [result.path.name for result in results] == [f"{index:03d}.png" for index in range(70)]
    for result, probabilities in zip(results[:64], expected, strict=True):
        names, values = zip(*result.guesses, strict=True)
        assert list(values) == sorted(values, reverse=True)
        torch.testing.assert_close(torch.tensor(values), probabilities[[int(name) for name in names]])


def test_the_command_prints_the_likeliest_classes_of_a_file(run, held_out, capsys):
    file = held_out[0] / "003.png"
    assert predict.main([str(run.folder.path), str(file), "--topk", "3"]) == 0
    head, *guesses = capsys.readouterr().out.splitlines()
    assert head == str(file)
    assert len(guesses) == 3
    assert all(re.fullmatch(r"  \d +\d+\.\d\d %", line) for line in guesses)


def test_a_file_that_is_no_image_is_named_and_skipped_and_the_exit_code_tells(run, held_out, capsys):
    folder, _ = held_out
    for path in list_images(folder)[5:]:
        path.unlink()
    (folder / "001.png").write_bytes((folder / "001.png").read_bytes()[:60])
    (folder / "002.jpg").write_text("not an image", encoding="utf-8")
    (folder / "notes.txt").write_text("not looked at", encoding="utf-8")
    assert predict.main([str(run.folder.path), str(folder), "--topk", "1"]) == 1
    output = capsys.readouterr()
    printed = [line for line in output.out.splitlines() if not line.startswith(" ")]
    assert printed == [str(folder / name) for name in ("000.png", "002.png", "003.png", "004.png")]
    skipped = output.err.splitlines()
    assert skipped[0].startswith(f"vim.predict: {folder / '001.png'} is skipped: ")
    assert skipped[1].startswith(f"vim.predict: {folder / '002.jpg'} is skipped: ")
    assert skipped[2:] == ["vim.predict: 2 of 6 images were skipped", "vim.predict: 1 file passed over (1 .txt)"]


@pytest.mark.parametrize(
    ("source", "images", "options", "message"),
    [
        ("{run}", "/nowhere.png", [], "there is no image or folder /nowhere.png"),
        ("{run}", "{empty}", [], "none of its files ends in .avif, .bmp, "),
        ("{empty}", "{image}", [], "there is no checkpoint"),
        ("{image}", "{image}", [], "is truncated, damaged or not a checkpoint"),
        ("/nowhere", "{image}", [], "there is no run folder, checkpoint or timm model '/nowhere'"),
        ("{run}", "{image}", ["--topk", "0"], "topk must be >= 1, got 0"),
        ("{run}", "{image}", ["--device", "gpu"], "device must be"),
        ("{run}/best.safetensors", "{image}", ["--weights", "raw"], "which holds one set of them, got 'raw'"),
        ("{run}/best.pth", "{image}", ["--model", "vim_tinny_patch16_224"], "did you mean 'vim_tiny_patch16_224'"),
        ("{run}/best.pth", "{image}", ["--model", "vim_tiny_patch16_224"], "does not load into"),
    ],
)
def test_a_mistake_ends_in_one_line_and_code_2(run, tmp_path, capsys, source, images, options, message):
    (tmp_path / "empty").mkdir()
    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    places = {"run": run.folder.path, "empty": tmp_path / "empty", "image": tmp_path / "a.png"}
    arguments = [source.format(**places), images.format(**places), *options]
    assert_refused(predict, arguments, message, capsys)


def test_every_file_of_a_run_predicts_alike_where_it_holds_the_same_weights(run, held_out):
    image = [Image.open(held_out[0] / "000.png")]
    raw = load_predictor(str(run.folder.last), weights="raw")
    averaged = load_predictor(str(run.folder.last), weights="ema")
    for predictor, module in ((raw, run.model), (averaged, run.state.ema.module)):
        for name, tensor in module.state_dict().items():
            assert torch.equal(predictor.model.state_dict()[name], tensor)
    assert not torch.equal(raw.probabilities(image), averaged.probabilities(image))
    best = load_predictor(str(run.folder.path)).probabilities(image)
    assert torch.equal(load_predictor(str(run.folder.best_weights)).probabilities(image), best)
    chosen = {"raw": raw, "ema": averaged}[run.position.best["weights"]]
    if run.position.best["epoch"] == 2:
        assert torch.equal(chosen.probabilities(image), best)


def test_a_checkpoint_of_the_original_predicts_with_the_name_of_its_model(tmp_path, capsys):
    torch.manual_seed(0)
    model = timm.create_model("vim_tiny_patch16_224").eval()
    path = tmp_path / "released.pth"
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=1e-3), "epoch": 3}, path)
    image = Image.new("RGB", (300, 260), (200, 30, 90))
    image.save(tmp_path / "a.png")
    predictor = load_predictor(str(path), model_name="vim_tiny_patch16_224")
    with torch.inference_mode():
        expected = model(predictor.preprocessing.transform()(image)[None]).softmax(1)
    torch.testing.assert_close(predictor.probabilities([image]), expected)
    assert predictor.class_names[0].startswith("tench")
    assert predict.main([str(path), str(tmp_path / "a.png")]) == 2
    assert "if another program wrote it, add --model NAME" in capsys.readouterr().err


def test_weights_that_do_not_say_their_model_are_refused(tmp_path):
    save_weights(tmp_path / "a.safetensors", {"weight": torch.zeros(2)}, {})
    with pytest.raises(CheckpointError, match="does not say which model it belongs to: add --model NAME"):
        load_predictor(str(tmp_path / "a.safetensors"))


def test_classes_that_are_folders_of_imagenet_are_put_into_words():
    assert describe_classes(["n01440764", "n00000000"]) == ["n01440764 tench, Tinca tinca", "n00000000"]
    assert describe_classes(["n01440764", "cat"]) == ["n01440764", "cat"]


def test_the_images_of_a_folder_are_those_that_training_finds(tmp_path):
    store = tmp_path / "store"
    for name in ("store/0.jpg", "store/10.webp", "store/9.bmp", "set/._0.jpg", "set/.cache/1.jpg", "set/x.heic"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.symlink(store, tmp_path / "set" / "linked")
    passed_over = Counter()
    found = list_images(tmp_path / "set", passed_over=passed_over)
    assert [path.name for path in found] == ["0.jpg", "9.bmp", "10.webp"]
    assert passed_over == {".heic": 1}
    assert list_images(tmp_path / "set", [".heic"]) == [tmp_path / "set" / "x.heic"]


def test_the_endings_of_the_run_count(run, held_out, capsys):
    folder, _ = held_out
    config = change(run.config, data__extensions=(".picture",))
    contents = {"config": config_to_dict(config), "class_names": run.task.class_names}
    path = folder / "weights.safetensors"
    save_weights(path, run.model.state_dict(), {METADATA_KEY: json.dumps(contents)})
    (folder / "000.png").rename(folder / "0.Picture")
    assert predict.main([str(path), str(folder), "--topk", "1"]) == 0
    output = capsys.readouterr()
    assert output.out.splitlines()[0] == str(folder / "0.Picture")
    assert output.err == "vim.predict: 70 files passed over (69 .png, 1 .safetensors)\n"


def test_a_photograph_is_predicted_upright(run, tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    random = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    Image.fromarray(random).save(tmp_path / "a.png", exif=exif)
    predictor = load_predictor(str(run.folder.path))
    (prediction,) = predictor.predict_files([tmp_path / "a.png"], topk=10)
    upright = predictor.probabilities([Image.fromarray(np.rot90(random, 3))])[0]
    assert [value for _, value in prediction.guesses] == upright.sort(descending=True).values.tolist()
    assert predictor.probabilities([Image.open(tmp_path / "a.png")])[0].equal(upright)


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="this system has no SIGPIPE")
def test_a_reader_that_has_enough_ends_it_without_a_word(run, held_out):
    reader, writer = os.pipe()
    python = Python("-m", "vim.predict", run.folder.path, held_out[0], "--device", "cpu", stdout=writer)
    os.close(writer)
    assert os.read(reader, 1 << 16).decode().startswith(f"{held_out[0] / '000.png'}\n")
    os.close(reader)
    assert python.communicate() == ("", "")
    assert python.returncode == -signal.SIGPIPE


def test_a_batch_of_photographs_is_never_in_memory_as_a_whole(run, held_out, monkeypatch):
    predictor = load_predictor(str(run.folder.path))
    read, seen, alive = predictor_module.read_image, [], []

    def counting(path):
        image = read(path)
        seen.append(weakref.ref(image))
        alive.append(sum(reference() is not None for reference in seen))
        return image

    monkeypatch.setattr(predictor_module, "read_image", counting)
    assert len(list(predictor.predict_files(list_images(held_out[0])[:6], topk=1))) == 6
    assert len(alive) == 6
    assert max(alive) <= 2


def test_a_name_that_the_output_cannot_show_ends_nothing(run, held_out):
    folder, _ = held_out
    image = folder / "000.png"
    names = [b"0_\xff.png", "1_\u56fe.png".encode(), b"2.png"]
    for name in names:
        with open(os.path.join(os.fsencode(folder), b"odd_" + name), "wb") as file:
            file.write(image.read_bytes())
    with io.TextIOWrapper(io.BytesIO(), encoding="latin-1", write_through=True) as stream, redirect_stdout(stream):
        assert predict.main([str(run.folder.path), str(folder), "--topk", "1"]) == 0
        lines = stream.buffer.getvalue().decode("latin-1").splitlines()
    shown = [line.rpartition("odd_")[2] for line in lines if "odd_" in line]
    assert shown == [r"0_\udcff.png", r"1_\u56fe.png", "2.png"]
