"""Slim weights, the original's layout, and what is refused."""

from __future__ import annotations

import os

import pytest
import timm
import torch
from safetensors import safe_open

from tests.models.test_pretrained import make_original_checkpoint
from vim.convert import main
from vim.inference.convert import convert_checkpoint, nearest_model

NAME = "vim_tiny_patch16_224"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model(NAME)
    path = tmp_path_factory.mktemp("released") / "released.pth"
    torch.save(make_original_checkpoint(model), path)
    return model, path


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_slim_weights_load_in_timm(released, weights, tmp_path):
    model, path = released
    out = tmp_path / "slim.safetensors"
    summary = convert_checkpoint(path, out, weights)
    assert summary.startswith(f"{len(model.state_dict())} tensors match {NAME}; {out}: {weights} weights, 27.")
    loaded = timm.create_model(NAME, checkpoint_path=str(out))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor + (weights == "ema")), name
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt", "architecture": NAME, "weights": weights}
    assert os.listdir(tmp_path) == [out.name]


def test_back_to_the_originals_layout(released, tmp_path):
    model, path = released
    convert_checkpoint(path, tmp_path / "slim.safetensors")
    convert_checkpoint(tmp_path / "slim.safetensors", tmp_path / "again.pth")
    convert_checkpoint(path, tmp_path / "both.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert set(again) == {"model"}
    assert list(again["model"]) == list(model.state_dict()) or set(again["model"]) == set(model.state_dict())
    assert all(torch.equal(again["model"][name], tensor) for name, tensor in model.state_dict().items())
    both = torch.load(tmp_path / "both.pth", weights_only=True)
    assert set(both) == {"model", "model_ema"}
    assert (tmp_path / "both.pth").stat().st_size < 61e6


def test_what_does_not_match_is_listed(tmp_path):
    torch.save(timm.create_model(NAME, depth=2, num_classes=10, cls_position="none").state_dict(), tmp_path / "a.pth")
    summary = convert_checkpoint(tmp_path / "a.pth", tmp_path / "b.safetensors")
    assert "1 of another shape (pos_embed)" in summary
    assert "missing (cls_token, layers.2.norm.weight, " in summary or "missing (cls_token," in summary
    with pytest.raises(ValueError, match="does not fit"):
        convert_checkpoint(tmp_path / "a.pth", tmp_path / "c.safetensors", model=NAME)
    assert not (tmp_path / "c.safetensors").exists()


@pytest.mark.parametrize(
    "name", [NAME, "vim_tiny_patch16_stride8_224", "vim_small_patch16_224", "vim_base_patch16_224"]
)
def test_the_nearest_model(name):
    with torch.device("meta"):
        assert nearest_model(timm.create_model(name).state_dict()) == name


@pytest.mark.parametrize(
    ("contents", "arguments", "message"),
    [
        ({"layers.0.blocks.0.op.x_proj_weight": torch.zeros(1)}, ["a.safetensors"], "VMamba's family"),
        ({"fc.weight": torch.zeros(1)}, ["a.safetensors"], "not of Vision Mamba: it has fc.weight"),
        ({"fc.weight": torch.zeros(1)}, ["a.bin"], "out must end in .safetensors or .pth"),
        ({"fc.weight": torch.zeros(1)}, ["nowhere/a.pth"], "there is no folder"),
        ({"fc.weight": torch.zeros(1)}, ["a.pth", "--model", "vim_huge"], "must be one that timm knows"),
        ({"model": {"fc.weight": torch.zeros(1)}}, ["a.pth", "--weights", "ema"], "no 'ema' weights"),
    ],
)
def test_what_is_refused(contents, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(contents, "in.pth")
    assert main(["in.pth", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert os.listdir() == ["in.pth"]
