"""`python -m vim.explain`: a picture an image, the class that was asked for, and clear words for the rest."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from tests.explain.test_attention import small_model
from tests.processes import Python
from tests.tiny_runs import tiny_config
from vim.data.preprocessing import Preprocessing
from vim.explain import __main__ as command
from vim.explain import explainer, receptive_field
from vim.explain.explainer import EXPLANATIONS, Explainer
from vim.explain.pictures import draw_receptive_fields
from vim.inference.predictor import Predictor
from vim.training.run_folder import RunFolder
from vim.training.trainer import Trainer

CLASSES = ("cat", "dog", "fish", "hen", "n01440764 tench $x^2$")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = RunFolder(tmp_path_factory.mktemp("explain") / "run")
    Trainer(tiny_config(), folder).fit()
    return str(folder.path)


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    (folder / "more").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    for name in ("a.png", "a.jpg", "more/b.png"):
        Image.fromarray(noise).save(folder / name)
    return folder


def make_predictor() -> Predictor:
    return Predictor(small_model(), preprocessing(32), CLASSES, torch.device("cpu"))


def preprocessing(side: int) -> Preprocessing:
    return Preprocessing(
        image_shape=(side, side), in_chans=3, mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, interpolation="bicubic"
    )


def test_every_image_of_a_folder_gets_a_picture(run, photographs, tmp_path, capsys):
    (photographs / "c.png").write_text("not an image")
    Image.fromarray(np.zeros((9, 9), np.float32)).save(photographs / "depth.tif")
    (photographs / "notes.txt").write_text("not looked at")
    output = tmp_path / "out"
    assert command.main([run, str(photographs), "--output", str(output)]) == 1
    names = ("a.jpg.png", "a.png.png", "more/b.png.png")
    assert sorted(str(p.relative_to(output)) for p in output.rglob("*.*")) == list(names)
    for name in names:
        with Image.open(output / name) as picture:
            assert picture.size[0] > picture.size[1] > 300
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].startswith(f"{photographs / 'a.jpg'}: ")
    assert printed.out.splitlines()[0].endswith(f" % -> {output / 'a.jpg.png'}")
    assert "c.png is skipped: " in printed.err
    assert "depth.tif is skipped: its pixels are 32-bit numbers" in printed.err
    assert "2 of 5 images were skipped" in printed.err
    assert "1 .txt" in printed.err


def test_every_method_draws(tmp_path):
    maps = []
    for method in EXPLANATIONS:
        Explainer(make_predictor(), [method]).draw(Image.new("L", (9, 9), 100), tmp_path / f"{method}.png")
        maps.append((tmp_path / f"{method}.png").read_bytes())
    assert len(set(maps)) == len(maps)


@pytest.mark.parametrize(("target", "number"), [("dog", 1), ("3", 3), (None, None)])
def test_the_class_that_is_asked_for_is_explained(target, number, tmp_path, monkeypatch):
    asked = []

    def record(model, pixels, target, method):
        asked.append(target)
        return torch.zeros(1, 4, 4)

    monkeypatch.setattr(explainer, "class_activation", record)
    guesses = Explainer(make_predictor(), ["gradcam"], target).draw(Image.new("RGB", (40, 40)), tmp_path / "x.png")
    assert asked == [CLASSES.index(guesses[0][0]) if number is None else number]
    assert sum(share for _, share in guesses) == pytest.approx(1)


def test_the_photograph_is_what_the_model_sees(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(explainer, "draw_explanation", lambda photograph, *_: seen.append(photograph))
    Explainer(make_predictor(), ["saliency"]).draw(Image.new("RGB", (64, 64), (255, 0, 51)), tmp_path / "x.png")
    torch.testing.assert_close(seen[0].mean((1, 2)), torch.tensor([1.0, 0.0, 0.2]), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "camera"], "method must be one of"),
        (["--target", "cow"], "target must be a class name or a number from 0 to "),
        (["--target", "99"], "target must be a class name or a number"),
        (["--target", "9" * 5000], "target must be a class name or a number"),
        (["--topk", "0"], "topk must be >= 1, got 0"),
        (["--device", "tpu"], "device must be"),
    ],
)
def test_bad_options(options, message, run, photographs, tmp_path, capsys):
    arguments = [run, str(photographs / "a.png"), "--output", str(tmp_path / "out"), *options]
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_files(run, photographs, tmp_path, capsys):
    assert command.main([run, str(photographs / "none.png")]) == 2
    assert "there is no image or folder" in capsys.readouterr().err
    assert command.main([str(tmp_path / "nothing"), str(photographs / "a.png")]) == 2
    assert "vim.explain: " in capsys.readouterr().err


def test_other_models_have_gradients_of_pixels_only(tmp_path):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 2))
    model.num_classes, model.in_chans = 2, 3
    predictor = Predictor(model, preprocessing(16), ("a", "b"), torch.device("cpu"))
    with pytest.raises(TypeError, match=r"must be a vim\.VisionMamba, got Sequential"):
        Explainer(predictor)
    Explainer(predictor, ["saliency"]).draw(Image.new("RGB", (16, 16)), tmp_path / "x.png")
    assert (tmp_path / "x.png").exists()


def test_receptive_fields_are_drawn(tmp_path):
    fields = [(t, receptive_field(small_model(), torch.randn(1, 3, 32, 32), t)) for t in ("center", "class")]
    draw_receptive_fields(fields, tmp_path / "fields.png")
    draw_receptive_fields([*fields, fields[0]], tmp_path / "rows.png", columns=2)
    with Image.open(tmp_path / "fields.png") as row, Image.open(tmp_path / "rows.png") as rows:
        assert row.size[0] > row.size[1]
        assert rows.size == (row.size[0], 2 * row.size[1])


def test_all_pictures_are_drawn_when_nobody_reads_the_lines(run, photographs, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    words = ["-m", "vim.explain", run, photographs, "--device", "cpu", "--output", tmp_path / "out"]
    python = Python(*words, stdout=writer)
    os.close(writer)
    assert "BrokenPipe" not in python.communicate()[1]
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3


def test_an_interrupt_ends_in_one_line(run, photographs, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Explainer, "draw", interrupt)
    assert command.main([run, str(photographs), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 130
    assert capsys.readouterr().err.endswith("vim.explain: interrupted\n")
