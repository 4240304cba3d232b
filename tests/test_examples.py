"""The model in one file, `examples/minimal_vim.py`, against the original's numbers and the library's model."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vim
from tests.helpers import (
    GOLDEN,
    assert_close,
    assert_golden,
    golden_tolerances,
    load_golden,
    recipe_tensor,
)

PATH = Path(__file__).parents[1] / "examples" / "minimal_vim.py"


@pytest.fixture(scope="module")
def minimal():
    spec = importlib.util.spec_from_file_location("minimal_vim", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_short_and_plain_pytorch():
    source = PATH.read_text()
    assert len(source.splitlines()) <= 200
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported == {"__future__", "argparse", "math", "torch", "numpy", "PIL"}


# Golden models that this file can be, and its arguments.
CASES = {"base_midcls": {}, "stride4": {"stride": 4}}


@pytest.mark.parametrize("case", list(CASES))
def test_golden(case, minimal):
    metadata, tensors = load_golden("models", case)
    _, base = load_golden("models", "base_weights")
    model = minimal.Vim(img_size=32, patch_size=8, dim=64, depth=4, num_classes=10, **CASES[case])
    model.load_state_dict({n: tensors.get(f"override.{n}", base.get(n)) for n in json.loads(metadata["keys"])})
    x = tensors["x"].requires_grad_()
    logits = model(x)
    listed = golden_tolerances(f"models/{case}")
    assert_golden(logits, tensors["logits64"], listed["logits"], "logits")
    (logits * tensors["cotangent"]).sum().backward()
    assert_golden(x.grad, tensors["grad.x"], listed["grad.x"], "grad.x")
    for name, norm in json.loads(metadata["grad_norms"]).items():
        assert abs(model.get_parameter(name).grad.double().norm().item() - norm) <= 1e-4 * norm, name


def test_full_size(minimal):
    name = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
    facts = json.loads((GOLDEN / "recipe" / f"{name}.json").read_text())
    _, tensors = load_golden("recipe", name)
    model = minimal.Vim().eval()
    state_dict = {n: list(t.shape) for n, t in model.state_dict().items()}
    assert state_dict == facts["state_dict"]
    weights = {n: recipe_tensor(n, shape, facts["salt"]).astype(np.float32) for n, shape in state_dict.items()}
    model.load_state_dict({n: torch.from_numpy(w) for n, w in weights.items()})
    x = torch.from_numpy(recipe_tensor("input", [facts["batch"], 3, 224, 224], facts["salt"]).astype(np.float32))
    with torch.inference_mode():
        assert (model(x) - tensors["logits64"]).abs().max() <= 1e-4


def test_it_equals_the_library_under_autocast(minimal):
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 10}
    theirs = vim.VisionMamba(**sizes, embed_dim=64, d_state=8).eval()
    ours = minimal.Vim(**sizes, dim=64, d_state=8).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert_close(ours(x), theirs(x), 1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(ours(x).float(), theirs(x).float(), 2e-2)


def test_it_classifies_an_image(minimal, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = minimal.Vim(depth=1)
    monkeypatch.setattr(minimal, "Vim", lambda: model)
    torch.save({"model": model.state_dict(), "args": Namespace(lr=1.0)}, tmp_path / "checkpoint.pth")
    Image.new("RGB", (300, 260), "red").save(tmp_path / "image.png")
    monkeypatch.setattr(sys, "argv", ["minimal_vim", str(tmp_path / "checkpoint.pth"), str(tmp_path / "image.png")])
    minimal.main()
    assert len(capsys.readouterr().out.splitlines()) == 5
