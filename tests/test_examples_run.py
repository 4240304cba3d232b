"""The examples run, on inputs small enough for a test."""

from __future__ import annotations

import importlib.util
import json
import re
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

from tests.tiny_runs import TINY_MODEL, write_image_folder

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def load(name: str) -> ModuleType:
    """Import an example by its file, as the folder is not a package."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_notebook_holds_what_it_printed_and_drew():
    """CI runs it anew; readers and the site see what is stored, without warnings of one machine."""
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] == number for number, cell in enumerate(cells, start=1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert not [output for output in outputs if output.get("name") == "stderr" or output["output_type"] == "error"]


def test_finetune_folder(tmp_path):
    folder = write_image_folder(tmp_path, ["cat", "dog"], {"train": 6, "val": 2})
    torch.save(timm.create_model("vim_tiny_patch16_224", **TINY_MODEL, img_size=16).state_dict(), tmp_path / "w.pth")
    arguments = [str(folder), "--epochs", "1", "--batch-size", "4", "--checkpoint", str(tmp_path / "w.pth")]
    accuracy = load("finetune_folder").main(arguments, **TINY_MODEL, img_size=16)
    assert accuracy in (0, 25, 50, 75, 100)


@pytest.mark.slow
def test_segmentation():
    small = ["--steps", "1", "--batch-size", "2", "--side", "32", "--width", "16"]
    assert 0 <= load("segmentation").main(small) <= 1


def test_block_in_your_model():
    assert 0 <= load("block_in_your_model").main(["--steps", "1", "--length", "5"]) <= 100


def test_onnx_inference_prepares_images_as_timm_does(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 50, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    transform = create_transform((3, 28, 28), crop_pct=0.875, interpolation="bicubic")
    expected = transform(Image.fromarray(pixels)).numpy()
    np.testing.assert_allclose(load("onnx_inference").prepare(tmp_path / "image.png", 28), expected, atol=1e-6)


def test_onnx_inference_refuses_a_model_of_other_channels(monkeypatch):
    example = load("onnx_inference")
    session = SimpleNamespace(get_inputs=lambda: [SimpleNamespace(shape=["batch", 1, 16, 16], type="tensor(float)")])
    monkeypatch.setattr(example.onnxruntime, "InferenceSession", lambda *args, **kwargs: session)
    with pytest.raises(SystemExit, match=r"gray\.onnx takes images of 1 channels; this example prepares RGB"):
        example.classify("gray.onnx", [])


@pytest.mark.slow
def test_onnx_inference_agrees_with_pytorch(tmp_path, capsys):
    from vim.inference.export import write_checked
    from vim.inference.export_formats import FORMATS

    example = load("onnx_inference")
    model = timm.create_model("vim_tiny_patch16_224", num_classes=3, **TINY_MODEL, img_size=16).eval()
    write_checked(model, tmp_path / "vim.onnx", FORMATS["onnx"], torch.randn(4, 3, 16, 16), 1e-4)
    Image.new("RGB", (20, 30), (200, 50, 50)).save(tmp_path / "image.png")
    (probabilities,) = example.classify(str(tmp_path / "vim.onnx"), [str(tmp_path / "image.png")])
    with torch.no_grad():
        expected = model(torch.from_numpy(example.prepare(tmp_path / "image.png", 16))[None]).softmax(1)[0]
    np.testing.assert_allclose(probabilities, expected.numpy(), atol=1e-5)
    example.main([str(tmp_path / "vim.onnx"), str(tmp_path / "image.png"), "--top", "2"])
    assert capsys.readouterr().out.count("class") == 2


@pytest.mark.slow
def test_the_ten_lines_of_the_readme():
    (code,) = re.findall(r"## Ten lines of use\n\n((?:    .*\n|\n)+)", (ROOT / "README.md").read_text())
    names: dict = {}
    with torch.no_grad():
        exec(textwrap.dedent(code), names)
    assert names["logits"].shape == (1, 10)
    assert [tuple(m.shape) for m in names["maps"]] == [(1, 192, 14, 14)] * 24
    assert names["hidden"].shape == (1, 100, 64)
