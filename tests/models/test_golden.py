"""Whole models against the original's numbers."""

from __future__ import annotations

import json
import random
import zlib

import numpy as np
import pytest
import timm
import torch

import vim
from tests.helpers import (
    GOLDEN,
    assert_close,
    assert_golden,
    golden_names,
    golden_tolerances,
    load_golden,
    recipe_tensor,
)
from vim.checkpoints.upstream import translate_model_args

CASES = golden_names("models")
RECIPES = golden_names("recipe")


def golden_model(case: str) -> tuple[vim.VisionMamba, dict[str, str], dict[str, torch.Tensor], dict]:
    metadata, tensors = load_golden("models", case)
    _, base = load_golden("models", "base_weights")
    forward = json.loads(metadata["forward"])
    forward.pop("return_features", None)
    model = vim.VisionMamba(**translate_model_args(**json.loads(metadata["config"]), **forward)).eval()
    weights = {name: tensors.get(f"override.{name}", base.get(name)) for name in json.loads(metadata["keys"])}
    assert list(model.state_dict()) == list(weights), "names and order of the state dict"
    for name, shape in json.loads(metadata["keys"]).items():
        assert list(model.state_dict()[name].shape) == shape, name
    model.load_state_dict(weights)
    return model, metadata, tensors, _drawn(metadata, tensors)


def _drawn(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> dict:
    """What the original drew from its seeded generators in the call."""
    if not metadata["rng"]:
        return {}
    random.seed(int(metadata["rng"]))
    torch.manual_seed(int(metadata["rng"]))
    tokens = json.loads(metadata["keys"])["pos_embed"][1]
    if "if_random_token_rank" in json.loads(metadata["forward"]):
        return {"token_order": torch.randperm(tokens)}
    return {"cls_index": random.randint(0, tokens - 1)}


def golden_logits(model: vim.VisionMamba, x: torch.Tensor, metadata: dict[str, str], drawn: dict) -> torch.Tensor:
    features = json.loads(metadata["forward"]).get("return_features", False)
    if not drawn:
        return model(x, return_features=features)
    return model.forward_head(model.forward_features(x, **drawn), pre_logits=features)


def test_all_golden_cases_are_there():
    assert (len(CASES), len(RECIPES)) == (30, 3)


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    model, metadata, tensors, drawn = golden_model(case)
    x = tensors["x"].requires_grad_()
    logits = golden_logits(model, x, metadata, drawn)
    listed = golden_tolerances(f"models/{case}")
    assert_golden(logits, tensors["logits64"], listed["logits"], "logits")
    (logits * tensors["cotangent"]).sum().backward()
    assert_golden(x.grad, tensors["grad.x"], listed["grad.x"], "grad.x")
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert unused == set(json.loads(metadata["unused"]))
    for key in (key for key in tensors if key.startswith("grad.") and key != "grad.x"):
        grad = model.get_parameter(key.removeprefix("grad.")).grad
        assert_close(grad, tensors[key], 10 * listed["grad_max_rel"][0] + 1e-6, key)
    for name, norm in json.loads(metadata["grad_norms"]).items():
        actual = model.get_parameter(name).grad.double().norm().item() if name not in unused else 0.0
        assert abs(actual - norm) <= 1e-4 * norm, name


@pytest.mark.parametrize("case", CASES)
def test_golden_in_float64(case):
    model, metadata, tensors, drawn = golden_model(case)
    model.double()
    logits = golden_logits(model, tensors["x"].double(), metadata, drawn)
    assert_close(logits, tensors["logits64"], 1e-10, "logits")
    (logits * tensors["cotangent"].double()).sum().backward()
    for name, norm in json.loads(metadata["grad_norms"]).items():
        grad = model.get_parameter(name).grad
        assert abs((0.0 if grad is None else grad.norm().item()) - norm) <= 1e-10 * norm + 1e-14, name


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n != min(RECIPES, key=len) else []) for n in RECIPES]
)
def test_full_size(name):
    facts = json.loads((GOLDEN / "recipe" / f"{name}.json").read_text())
    _, tensors = load_golden("recipe", name)
    model = timm.create_model(facts["model"], drop_path_rate=0.0)
    assert {n: list(t.shape) for n, t in model.state_dict().items()} == facts["state_dict"]
    assert list(model.state_dict()) == list(facts["state_dict"])
    assert sum(p.numel() for p in model.parameters()) == facts["num_params"]
    # The original names parameters, too, that no model of its has.
    assert sorted(model.no_weight_decay()) == [n for n in facts["no_weight_decay"] if n in facts["state_dict"]]
    weights = {n: recipe_tensor(n, shape, facts["salt"]).astype(np.float32) for n, shape in facts["state_dict"].items()}
    for n, (crc, total) in facts["fill_check"].items():
        assert zlib.crc32(weights[n].tobytes()) == crc or abs(weights[n].sum(dtype=np.float64) - total) < 1e-5
    model.load_state_dict({n: torch.from_numpy(w) for n, w in weights.items()})
    x = torch.from_numpy(recipe_tensor("input", [facts["batch"], 3, 224, 224], facts["salt"]).astype(np.float32))
    cotangent = recipe_tensor("cotangent", [facts["batch"], 1000], facts["salt"]).astype(np.float32)
    logits = model(x.requires_grad_())
    assert (logits - tensors["logits64"]).abs().max() <= 1e-4
    (logits * torch.from_numpy(cotangent)).sum().backward()
    for n, parameter in model.named_parameters():
        grad = parameter.grad.double()
        assert abs(grad.norm().item() / facts["grad_norm"][n] - 1) < 1e-4, n
        probe = recipe_tensor(f"probe:{n}", list(grad.shape), facts["salt"])
        # A probe is a random direction: its error is of the order of the gradient's.
        error = abs((grad * torch.from_numpy(probe)).sum().item() - facts["grad_probe"][n])
        assert error <= 5e-4 * facts["grad_norm"][n], n
    assert abs(x.grad.double().norm().item() / facts["grad_input"]["norm"] - 1) < 1e-4


def test_printed_structure():
    model = timm.create_model("vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2")
    printed = str(model)
    for line in ("  (head_drop): Dropout(p=0.0, inplace=False)\n", "  (tokens): Identity()\n"):
        printed = printed.replace(line, "")  # the original has neither dropout before its head nor a place for hooks
    assert printed == (GOLDEN / "repr_vim_tiny.txt").read_text().rstrip("\n")
