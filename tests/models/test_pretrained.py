"""Published weights: offline errors, files of the original's format, resampling, and what is refused."""

from __future__ import annotations

import argparse
import fractions
import re
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

import vim
from tests.helpers import assert_close
from tests.models.small import small as small_model
from tests.processes import run_command
from vim.layers.token_sequence import extract_tokens
from vim.models.pretrained import checkpoint_filter_fn, read_checkpoint, select_weights

NAME = "vim_tiny_patch16_224"


def small(**kwargs) -> vim.VisionMamba:
    return small_model(**{"depth": 2, **kwargs})


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


def make_original_checkpoint(model: torch.nn.Module) -> dict:
    """What the original's training loop saves; the average is another set of numbers."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    raw = model.state_dict()
    return {
        "model": raw,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"t_initial": 300, "values": [1e-3]},
        "epoch": 299,
        "model_ema": {name: tensor + 1 for name, tensor in raw.items()},
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model=NAME, lr=1e-3, output_dir=None),
    }


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A one-block tiny model and a file of the original's format with it."""
    model = timm.create_model(NAME, depth=1)
    path = tmp_path_factory.mktemp("released") / "released.pth"
    torch.save(make_original_checkpoint(model), path)
    return model, path


def load(path, name=NAME, **kwargs):
    """Load a file in place of the published one."""
    overlay = {"file": str(path)}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **{"depth": 1, **kwargs})


def _check_message(seconds: float, message: str) -> None:
    assert seconds < 5
    assert "\n" not in message
    for part in ("vim_t_midclstok_76p1acc.pth", "/hustvl/Vim-tiny-midclstok/resolve/main/", "checkpoint_path="):
        assert part in message


def test_offline_the_error_comes_at_once_and_says_what_to_do():
    start = time.monotonic()
    with pytest.raises(RuntimeError) as error:  # tests/conftest.py has set HF_HUB_OFFLINE
        timm.create_model("vim_tiny_patch16_224.in1k", pretrained=True)
    _check_message(time.monotonic() - start, str(error.value))


@pytest.mark.slow
def test_without_a_network_the_error_comes_at_once_and_says_what_to_do():
    script = (
        "import time, timm, vim; start = time.monotonic()\n"
        "try: timm.create_model('vim_tiny_patch16_224.in1k', pretrained=True)\n"
        "except RuntimeError as error: print(f'{time.monotonic() - start:.1f}|{error}')\n"
    )
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    seconds, _, message = run_command(sys.executable, "-c", script, **nowhere).strip().partition("|")
    _check_message(float(seconds), message)


def test_a_released_file_loads_with_either_set_of_weights(released):
    model, path = released
    raw, average = load(path), load(path, pretrained_weights="ema")
    for name, tensor in model.state_dict().items():
        assert torch.equal(raw.state_dict()[name], tensor), name
        assert torch.equal(average.state_dict()[name], tensor + 1), name
    assert raw.pretrained_cfg["state_dict"] is None
    by_path = timm.create_model(NAME, depth=1, checkpoint_path=str(path))
    assert torch.equal(by_path.head.weight, model.head.weight + 1), "timm's checkpoint_path takes the average"


def test_the_head_is_left_out_for_other_classes_and_filters_adapt_to_other_channels(released):
    model, path = released
    other = load(path, num_classes=7, in_chans=1)
    assert other.head.weight.shape == (7, 192)
    assert_close(other.patch_embed.proj.weight, model.patch_embed.proj.weight.sum(1, keepdim=True), 1e-6)
    assert torch.equal(other.layers[0].mixer.A_log, model.layers[0].mixer.A_log)


def test_features_only(released):
    model, path = released
    features = load(path, features_only=True, out_indices=(0,))
    x = torch.randn(1, 3, 224, 224)
    wanted = model.eval().forward_intermediates(x, intermediates_only=True)
    assert_close(features.eval()(x)[0], wanted[0], 1e-5)


def test_a_pyramid_has_the_published_backbone(released, monkeypatch):
    model, path = released
    asked = []

    def find(repo, filename, **kwargs):
        asked.append((repo, filename))
        return str(path)

    monkeypatch.setattr("vim.models.pretrained.try_to_load_from_cache", find)
    pyramid = timm.create_model("vim_tiny_pyramid_patch16_224", pretrained=True, features_only=True, depth=1).eval()
    assert asked == [("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth")]
    x = torch.randn(1, 3, 224, 224)
    (tap,) = model.eval().forward_intermediates(x, indices=[0], intermediates_only=True)
    for level, resize in zip(pyramid(x), pyramid.resize, strict=True):
        assert_close(level, resize(tap), 1e-5)


@pytest.mark.parametrize(
    ("name", "kwargs", "grid"),
    [
        (NAME, {"img_size": 384}, (24, 24)),
        (NAME, {"img_size": (512, 1024)}, (32, 64)),
        (NAME, {"img_size": (448, 112)}, (28, 7)),  # as many patches as 14 x 14
        ("vim_tiny_patch16_stride8_224", {}, (27, 27)),
    ],
    ids=str,
)
def test_the_class_token_keeps_its_embedding_and_patches_are_interpolated(released, name, kwargs, grid):
    model, path = released
    resized = load(path, name, **kwargs)
    patches = grid[0] * grid[1]
    (token,), new = extract_tokens(resized.pos_embed, (patches // 2,))
    (old_token,), old = extract_tokens(model.pos_embed, (98,))
    assert torch.equal(token, old_token)
    old_map = old.unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    wanted = F.interpolate(old_map, size=grid, mode="bicubic", align_corners=False).flatten(2).mT
    assert_close(new, wanted, 1e-5)


def test_the_originals_interpolation_for_recipes(released):
    model, path = released
    resized = load(path, "vim_tiny_patch16_stride8_224", pretrained_resampling="reference")
    old_map = model.pos_embed[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    wanted = F.interpolate(old_map, size=(27, 27), mode="bicubic", align_corners=False).flatten(2).mT
    assert torch.equal(resized.pos_embed[:, :1], model.pos_embed[:, :1])
    assert_close(resized.pos_embed[:, 1:], wanted, 1e-6)
    assert not torch.allclose(resized.pos_embed, load(path, "vim_tiny_patch16_stride8_224").pos_embed)
    assert torch.equal(load(path, pretrained_resampling="reference").pos_embed, model.pos_embed)


@pytest.mark.parametrize("position", ["none", "head", "middle", "double"])
def test_every_place_of_the_class_token_equals_a_resized_model(position):
    model = small(cls_position=position).eval()
    other = small(cls_position=position, img_size=(48, 64)).eval()
    other.load_state_dict(checkpoint_filter_fn(model.state_dict(), other))
    model.set_input_size((48, 64))
    x = torch.randn(1, 3, 48, 64)
    assert torch.equal(other(x), model(x))


def test_a_backbone_without_a_class_token_takes_a_checkpoint_with_one(released):
    model, path = released
    bare = load(path, cls_position="none")
    _, patches = extract_tokens(model.pos_embed, (98,))
    assert torch.equal(bare.pos_embed, patches)
    assert "cls_token" not in bare.state_dict()


def test_rope_checkpoints_have_the_class_token_first():
    model, bare = small(rotary="hidden", cls_position="head"), small(rotary="hidden", cls_position="none")
    assert torch.equal(checkpoint_filter_fn(model.state_dict(), bare)["pos_embed"], model.pos_embed[:, 1:])


def test_another_patch_size_resamples_the_filters(released):
    model, path = released
    resized = load(path, patch_size=8, img_size=112)
    assert resized.patch_embed.proj.weight.shape == (192, 3, 8, 8)
    assert torch.equal(resized.pos_embed, model.pos_embed)


OF_OTHER_LOOPS = {
    "Lightning": lambda state: {
        "state_dict": prefixed("model.", state),
        "epoch": 1,
        "pytorch-lightning_version": "2.6",
    },
    "Lightning, compiled": lambda state: {"state_dict": prefixed("model._orig_mod.", state)},
    "blocks compiled one by one": lambda state: {
        re.sub(r"(layers\.\d)", r"\1._orig_mod", k): v for k, v in state.items()
    },
    "PyTorch's tutorial": lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {0: {}}}},
    "torch-em": lambda state: {"model_state": state, "iteration": 1},
    "net": lambda state: {"net": prefixed("module.", state), "acc": 90.0},
    "parallel, compiled": lambda state: prefixed("module._orig_mod.", state),
    "compiled, parallel": lambda state: prefixed("_orig_mod.module.", state),
    "two levels": lambda state: {"state": {"net": state}, "settings": {"depth": 2}},
    "backbone of a larger model": lambda state: {**prefixed("backbone.", state), "decoder.weight": torch.zeros(1)},
    "SWA": lambda state: {"n_averaged": torch.tensor(2), **prefixed("module.", state)},
    "after thop": lambda state: {**state, "total_ops": torch.zeros(1), "layers.0.mixer.total_params": torch.zeros(1)},
    "NumPy beside": lambda state: {"model": state, "best": np.float64(0.9), "loss": np.zeros(3), "n": np.int64(2)},
}


@pytest.mark.parametrize("kind", OF_OTHER_LOOPS)
def test_checkpoints_of_other_loops(kind, tmp_path):
    model = small()
    contents = OF_OTHER_LOOPS[kind](model.state_dict())
    torch.save(contents, tmp_path / "file.pth")
    found = select_weights(read_checkpoint(tmp_path / "file.pth"))
    assert found.keys() == model.state_dict().keys()
    if kind != "NumPy beside":  # timm reads `checkpoint_path`, and refuses that
        other = small()
        torch.nn.init.zeros_(other.head.weight)
        timm.models.load_checkpoint(other, str(tmp_path / "file.pth"))
        torch.testing.assert_close(dict(other.named_parameters()), dict(model.named_parameters()))


def test_what_was_taken_is_said(caplog):
    state = small().state_dict()
    with caplog.at_level("INFO"):
        select_weights({"net": {**prefixed("vision.", state), **{f"text.{i}": torch.zeros(1) for i in range(5)}}})
    assert [record.getMessage() for record in caplog.records] == [
        "the weights are the checkpoint's 'net'",
        "the weights are the checkpoint's vision.*; left out: text.0, text.1, text.2 and 2 more",
    ]


def test_several_models_in_a_checkpoint_are_refused():
    state = small().state_dict()
    with pytest.raises(ValueError, match=r"several state dicts \(net, teacher\); save the one to load"):
        select_weights({"net": state, "teacher": state})
    with pytest.raises(ValueError, match=r"several models \(student\.\*, teacher\.\*\); save the one to load"):
        small().load_state_dict({**prefixed("student.", state), **prefixed("teacher.", state)})


def test_a_model_with_counters_of_its_own_gets_them_back():
    model = small()
    model.register_buffer("total_ops", torch.ones(1))
    state = model.state_dict()
    model.total_ops = torch.zeros(1)
    model.load_state_dict(state)
    assert model.total_ops == 1


def test_a_whole_model_is_refused_with_what_to_save_instead(tmp_path):
    torch.save(small(), tmp_path / "model.pth")
    with pytest.raises(
        RuntimeError, match=r"holds a whole model, .*; in the program that wrote it, save the state dict"
    ):
        read_checkpoint(tmp_path / "model.pth")


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "model.pth")

    file = file_with(tmp_path, {"a": ONE})
    monkeypatch.setattr(torch, "load", refuse)  # root may read any file
    with pytest.raises(RuntimeError, match=r"bad.pth cannot be read: Permission denied"):
        read_checkpoint(file)


def file_with(tmp_path: Path, contents: object) -> Path:
    path = tmp_path / "bad.pth"
    torch.save(contents, path)
    return path


def written(tmp_path: Path, name: str, data: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def filtered(**changes):
    """Fit a changed state dict to a model of other arguments."""
    kwargs, remove, add = changes.pop("kwargs", {}), changes.pop("remove", ()), changes.pop("add", {})
    source = changes.pop("source", {})
    state = {k: v for k, v in small(**source).state_dict().items() if k not in remove}
    return checkpoint_filter_fn({**state, **add}, small(**kwargs), **changes)


def pickled(tmp_path: Path, pickle: bytes) -> Path:
    with zipfile.ZipFile(tmp_path / "odd.pth", "w") as archive:
        for name, data in {"data.pkl": pickle, "version": b"3\n", "data/0": b"1234"}.items():
            archive.writestr(f"archive/{name}", data)
    return tmp_path / "odd.pth"


ONE = torch.zeros(1)
READING = {
    "no file": (lambda p: p / "none.pth", "there is no checkpoint .*none.pth"),
    "no safetensors file": (lambda p: p / "none.safetensors", "there is no checkpoint"),
    "a folder": (lambda p: p, "there is no checkpoint"),
    "a foreign class": (lambda p: file_with(p, {"args": fractions.Fraction(1, 2)}), r"it needs fractions\.Fraction"),
    "a whole model": (lambda p: file_with(p, torch.nn.Linear(1, 1)), "it holds a whole model"),
    "a list": (lambda p: file_with(p, [ONE]), "must hold a dict, got list"),
    "an empty file": (lambda p: written(p, "a.pth", b""), "damaged or not a PyTorch checkpoint"),
    "text": (lambda p: written(p, "a.pth", b"hello there"), "damaged or not a PyTorch checkpoint"),
    "a web page": (lambda p: written(p, "a.pth", b"<!DOCTYPE html>"), "damaged or not a PyTorch checkpoint"),
    "half a file": (
        lambda p: written(p, "a.pth", file_with(p, {"a": torch.zeros(5000)}).read_bytes()[:9000]),
        "damaged or not a PyTorch checkpoint",
    ),
    "an empty stack": (lambda p: pickled(p, b"\x80\x02."), "damaged or not a PyTorch checkpoint"),
    "a key without a value": (lambda p: pickled(p, b"\x80\x02}(K\x01u."), "damaged or not a PyTorch checkpoint"),
    "an odd dict": (
        lambda p: pickled(p, b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R."),
        "damaged or not a PyTorch checkpoint",
    ),
    "an odd tensor": (
        lambda p: pickled(p, b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01tR."),
        "damaged or not a PyTorch checkpoint",
    ),
    "half a safetensors file": (lambda p: written(p, "a.safetensors", b"\x10" * 20), "truncated or not a safetensors"),
}
SELECTING = {
    "nothing": ({}, {}, "the checkpoint has no tensors"),
    "an empty model": ({"model": {}}, {}, "the checkpoint has no tensors"),
    "no average": ({"model": {"a": ONE}}, {"weights": "ema"}, "no 'ema' weights, but 'raw'"),
    "no raw weights": ({"model_ema": {"a": ONE}}, {}, "no 'raw' weights, but 'ema'"),
    "a plain state dict": ({"a": ONE}, {"weights": "ema"}, "no 'ema' weights: it is a plain state dict"),
    "a wrong kind": ({"a": ONE}, {"weights": "best"}, "weights must be 'raw' or 'ema', got 'best'"),
    "a number": ({"a": 3}, {}, "'a' must be a tensor, got int"),
    # Names as these models' public code makes them.
    "VMamba": ({"layers.0.blocks.0.op.in_proj.weight": ONE}, {}, "is of VMamba's family"),
    "VMamba's parameters": ({"layers.0.blocks.0.op.A_logs": ONE}, {}, "is of VMamba's family"),
    "the first VMamba": ({"layers.0.blocks.0.self_attention.in_proj.weight": ONE}, {}, "is of VMamba's family"),
    "a segmenter of VMamba": ({"backbone.layers.1.blocks.0.op.x_proj_weight": ONE}, {}, "is of VMamba's family"),
    "kyegomez": ({"layers.0.forward_conv1d.weight": ONE}, {}, "is of kyegomez/VisionMamba's model"),
    "kyegomez whole": (
        {"cls_token": ONE, "to_patch_embedding.1.weight": ONE, "layers.0.backward_conv1d.weight": ONE},
        {},
        "is of kyegomez/VisionMamba's model",
    ),
    "vit-pytorch": ({"to_patch_embedding.1.weight": ONE}, {}, "is of vit-pytorch's kind"),
    "MambaVision": ({"levels.0.blocks.0.conv1.weight": ONE}, {}, "is of MambaVision"),
    "a language model": ({"backbone.layers.0.mixer.A_log": ONE}, {}, "is of a Mamba language model"),
    "a ViT": ({"blocks.0.attn.qkv.weight": ONE}, {}, "is of a vision transformer"),
    "VideoMamba": ({"temporal_pos_embedding": ONE}, {}, "is of VideoMamba"),
    "video": ({"patch_embed.proj.weight": torch.zeros(2, 3, 1, 4, 4)}, {}, "proj.weight must have 4 axes"),
}
FITTING = {
    "another network": (lambda: checkpoint_filter_fn({"fc.weight": ONE}, small()), "has no 'layers.0.mixer"),
    "fewer blocks": (lambda: filtered(source={"depth": 1}), "has 1 blocks, the model has depth=2"),
    "another width": (lambda: filtered(source={"embed_dim": 16}), "has width 16, the model has embed_dim=32"),
    "another state": (
        lambda: filtered(source={"d_state": 8}),
        r"A_log has shape \(64, 8\), the model's \(64, 4\)",
    ),
    "another expansion": (lambda: filtered(source={"expand": 1}), "has shape"),
    "two class tokens": (lambda: filtered(source={"cls_position": "double"}), "create it with cls_position='double'"),
    "no class token": (lambda: filtered(source={"cls_position": "none"}), "create it with cls_position='none'"),
    "no grid": (
        lambda: filtered(add={"pos_embed": torch.zeros(1, 8, 32)}),
        "must come from a square grid of patches, got 7 patches",
    ),
    "a wrong resampling": (lambda: filtered(resampling="nearest"), "resampling must be 'exact' or 'reference'"),
    "a reference without a class token": (
        lambda: filtered(source={"cls_position": "none"}, kwargs={"cls_position": "none"}, resampling="reference"),
        "needs one class token in the checkpoint and in the model",
    ),
}


@pytest.mark.parametrize("case", list(READING))
def test_files_that_are_refused(case, tmp_path):
    make, message = READING[case]
    with pytest.raises((FileNotFoundError, RuntimeError), match=message) as caught:
        read_checkpoint(make(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", list(SELECTING))
def test_contents_that_are_refused(case):
    contents, kwargs, message = SELECTING[case]
    with pytest.raises(ValueError, match=message) as caught:
        select_weights(contents, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", list(FITTING))
def test_weights_that_do_not_fit(case):
    call, message = FITTING[case]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"hf_hub_id": None}), "no weights"),
        (lambda: load("nowhere.pth"), "there is no checkpoint nowhere.pth"),
    ],
    ids=["unpublished", "file"],
)
def test_names_that_are_refused(call, message):
    with pytest.raises((RuntimeError, FileNotFoundError), match=re.compile(message)):
        call()
