"""Hidden attention: matrices that give the scan's output, tokens in the order of `forward_features`."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vim
from vim.explain import HiddenAttention, attention_rollout, hidden_attention, scan_matrices
from vim.ops import selective_scan

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "d_state": 4, "num_classes": 5}


def small_model(**arguments) -> vim.VisionMamba:
    torch.manual_seed(0)
    return vim.VisionMamba(**SMALL | arguments).eval()


def images(batch: int = 2, side: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("directions", ["v2", "v1", "none"])
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "another dt_proj"])
def test_matrices_times_inputs_are_the_scan(directions, plain):
    torch.manual_seed(0)
    mixer = vim.Mamba(12, d_state=4, directions=directions)
    if not plain:
        mixer.dt_proj = nn.Sequential(mixer.dt_proj)
    tokens = torch.randn(2, 9, 12)
    total = 0
    with torch.no_grad():
        scans = mixer.scan_inputs(tokens)
        for scan in scans:
            matrices = scan_matrices(scan)
            assert matrices.shape == (2, 24, 9, 9)
            y = (matrices @ scan["u"][..., None])[..., 0] + scan["D"][:, None] * scan["u"]
            y = y * nn.functional.silu(scan["z"])
            torch.testing.assert_close(y, selective_scan(**scan), atol=1e-5, rtol=1e-5)
            outside = matrices.tril(-1) if scan["reverse"] else matrices.triu(1)
            assert not outside.any(), "no token reads what comes after it"
            torch.testing.assert_close(scan_matrices(scan, slice(5, 7)), matrices[:, 5:7])
            total = total + y.mT
        expected = mixer(tokens)
        torch.testing.assert_close(mixer.out_proj(total / len(scans)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("absolute", [False, True])
def test_attention_is_the_mean_of_gated_matrices(absolute, monkeypatch):
    monkeypatch.setattr("vim.explain.attention._MOST_NUMBERS", 32 * 17 * 2)  # columns come in nine parts
    model = small_model(cls_position="head")
    with torch.no_grad():
        attention = hidden_attention(model, images(), layers=[1], absolute=absolute)
        seen = []
        model.layers[1].register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
        model(images())
        ((x, residual),) = seen
        scans = model.layers[1].mixer.scan_inputs(model.layers[1].norm(x, residual)[0])
        expected = 0
        for scan in scans:
            gated = scan_matrices(scan) * nn.functional.silu(scan["z"])[..., None]
            expected = expected + (gated.abs() if absolute else gated).mean(1) / 2
    torch.testing.assert_close(attention.matrices[0], expected)


@pytest.mark.parametrize(
    ("arguments", "direction"),
    [
        ({"cls_position": "none"}, "both"),
        ({"cls_position": "head"}, "both"),
        ({"cls_position": "middle"}, "both"),
        ({"cls_position": "double"}, "forward"),
        ({"cls_position": "random"}, "backward"),
        ({"img_size": (16, 32), "patch_stride": 4}, "both"),
        ({"pairwise_layers": True, "depth": 4}, "both"),
        ({"flip_ratio": 1.0}, "both"),
        ({"token_shuffle": True}, "both"),
        ({"rotary": "residual"}, "both"),
        ({"directions": "none", "cls_position": "none", "global_pool": "last"}, "forward"),
    ],
    ids=str,
)
def test_variants(arguments, direction):
    model = small_model(**arguments)
    height, width = model.patch_embed.img_size
    attention = hidden_attention(model, torch.randn(2, 3, height, width), direction=direction)
    rows, columns = model.patch_embed.grid_size
    length = rows * columns + model.num_prefix_tokens
    assert attention.matrices.shape == (model.depth, 2, length, length)
    assert attention.maps().shape == (model.depth, 2, rows, columns)
    assert attention_rollout(attention).sum(-1).allclose(torch.ones(2, length))


class _Largest(TorchDispatchMode):
    """The largest number of elements of a tensor that an op returns."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        self.numbers = max(self.numbers, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)), 0)
        return result


def test_memory_is_bounded(monkeypatch):
    """No tensor is larger than a part of the columns, or than the result: never all columns of all channels."""
    model = small_model(img_size=64, embed_dim=32)
    pixels = images(2, 64)
    length, inner = 65, 64
    monkeypatch.setattr("vim.explain.attention._MOST_NUMBERS", 4 * inner * length)
    with _Largest() as seen:
        hidden_attention(model, pixels)
    assert 4 * inner * length <= seen.numbers <= max(4 * inner * length, 2 * 2 * length * length)
    monkeypatch.undo()
    with _Largest() as seen:
        hidden_attention(model, pixels)
    assert seen.numbers <= inner * length * -(-length // 8), "a part is an eighth at most"


def test_tokens_stand_as_features_do():
    """Of a block that looks back, the class token in the middle takes from the first half of the patches only."""
    model = small_model(cls_position="middle", directions="none")
    attention = hidden_attention(model, images(1), layers=0, absolute=True)
    taken = attention.maps()[0, 0].flatten()
    assert (taken[:8] > 0).all()
    assert not taken[8:].any()
    # The first patch reads nothing but itself; the last one reads all that comes before it.
    assert attention.matrices[0, 0, 1].count_nonzero() == 1
    assert attention.matrices[0, 0, -1].count_nonzero() == 17


def test_pairwise_layers_read_from_the_end():
    model = small_model(cls_position="none", directions="none", pairwise_layers=True)
    attention = hidden_attention(model, images(1), absolute=True)
    assert not attention.matrices[0].triu(1).any()
    assert not attention.matrices[1].tril(-1).any()
    assert attention.matrices[1, 0, 0].count_nonzero() == 16


def test_the_model_is_left_as_it_was():
    model = small_model(drop_path_rate=0.5).train()
    model.layers[0].eval()
    hidden_attention(model, images())
    assert model.training
    assert not model.layers[0].mixer.training
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"layers": 2}, ValueError, "layers must be from -2 to 1, got 2"),
        ({"layers": []}, ValueError, "at least one layer"),
        ({"layers": "last"}, TypeError, "layers must be a number"),
        ({"direction": "sideways"}, ValueError, "direction must be one of"),
        ({"images": torch.zeros(0, 3, 32, 32)}, ValueError, r"at least one image, got \(0, 3, 32, 32\)"),
        ({"images": torch.zeros(3, 32, 32)}, ValueError, "images must be"),
        ({"images": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)}, TypeError, "floating tensor, got torch.uint8"),
        ({"images": "cat.png"}, TypeError, "floating tensor, got str"),
        ({"images": torch.full((1, 3, 32, 32), torch.nan)}, ValueError, "images must be finite"),
        ({"model": nn.Linear(2, 2)}, TypeError, "must be a vim.VisionMamba, got Linear"),
        ({"model": nn.DataParallel(nn.Linear(2, 2))}, TypeError, r"got DataParallel: pass model\.module"),
    ],
)
def test_bad_input(kwargs, error, message):
    with pytest.raises(error, match=message):
        hidden_attention(**{"model": small_model(), "images": images()} | kwargs)


def test_a_layer_without_a_backward_scan_has_no_backward_attention():
    with pytest.raises(ValueError, match="whose mixer has no backward scan"):
        hidden_attention(small_model(directions="none"), images(), direction="backward")


def test_a_compiled_model_is_refused():
    with pytest.raises(TypeError, match="_orig_mod"):
        hidden_attention(torch.compile(small_model()), images())


def test_another_mixer_is_refused():
    model = small_model()
    model.layers[1].mixer = nn.Identity()
    with pytest.raises(TypeError, match=r"mixer of layer 1 must be a vim\.Mamba"):
        hidden_attention(model, images())
    assert isinstance(hidden_attention(model, images(), layers=0), HiddenAttention)


@pytest.mark.parametrize(
    "layers", [np.int64(-1), np.array([1]), torch.tensor(1), torch.tensor([1]), range(1, 2)], ids=repr
)
def test_layers_may_be_numbers_of_other_packages(layers):
    assert hidden_attention(small_model(), images(), layers).layers == (1,)


@pytest.mark.parametrize("layers", [[1, 0], [0, 0], [0, 2]])
def test_rollout_needs_consecutive_layers(layers):
    with pytest.raises(ValueError, match="attention must be of consecutive layers, got layers"):
        attention_rollout(hidden_attention(small_model(depth=3), images(), layers))


def test_rollout_takes_pairs_of_layers_as_one_step():
    model = small_model(pairwise_layers=True, depth=5)
    attention = hidden_attention(model, images())
    assert attention.layers == (0, 1, 2, 3), "the last one has no partner, and is not run"
    first, second = (attention.matrices.abs() / attention.matrices.abs().sum(-1, keepdim=True)).split(2)
    same = torch.eye(first.shape[-1])
    expected = (same + second.mean(0)) / 2 @ ((same + first.mean(0)) / 2)
    torch.testing.assert_close(attention_rollout(attention), expected)
    for layers in ([0], [1, 2]):
        with pytest.raises(ValueError, match="in whole pairs"):
            attention_rollout(hidden_attention(model, images(), layers))


def test_predictions_in_another_thread_are_not_explained():
    """Another thread runs the model in the middle of an explanation; its tokens are not explained."""
    model = small_model()
    expected = hidden_attention(model, images()).matrices
    others = [threading.Thread(target=model, args=(images().flip(3),))]

    def meanwhile(*_):
        if others:
            other = others.pop()
            other.start()
            other.join()

    model.norm_f.register_forward_pre_hook(meanwhile)
    model.layers[1].register_forward_hook(meanwhile)
    assert torch.equal(hidden_attention(model, images()).matrices, expected)
    assert not others
