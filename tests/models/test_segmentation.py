"""UPerNet on a Vim: its size, its outputs, and that an image does not depend on its batch."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import vim
from tests.helpers import assert_close
from vim.inference.export import write_checked
from vim.inference.export_formats import FORMATS
from vim.models.segmentation import Segmenter

SMALL = {"patch_size": 8, "embed_dim": 16, "depth": 4, "d_state": 4, "img_size": 64, "cls_position": "none"}


def small(**changes) -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(vim.VisionMamba(**SMALL), 3, **{"aux_channels": 8, "channels": 8, **changes})


def test_the_parameters_are_as_many_as_the_original_prints():
    """12,901,100, with the auxiliary head, of a model for 1,024 pixels whose final norm no level reads."""
    model = timm.create_model("vim_tiny_patch16_224", img_size=1024, cls_position="none")
    segmenter = Segmenter(model, 150, blocks=(5, 11, 17, 23), tap="mixer", norm="batch")
    final_norm = 192
    assert sum(parameter.numel() for parameter in segmenter.parameters()) + final_norm == 12_901_100


def test_logits_have_the_size_of_the_images_and_in_training_that_of_the_maps():
    model, x = small(), torch.randn(2, 3, 64, 64)
    logits, aux = model(x)
    assert (logits.shape, aux.shape) == ((2, 3, 16, 16), (2, 3, 4, 4))
    assert model.eval()(x).shape == (2, 3, 64, 64)
    assert small(aux_channels=None)(x)[1] is None


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_every_parameter_learns(norm):
    model = small(norm=norm)
    model.set_grad_checkpointing()
    logits, aux = model(torch.randn(2, 3, 64, 64))
    (logits.square().mean() + aux.square().mean()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    kinds = {type(module) for module in model.modules()}
    assert ((nn.BatchNorm2d in kinds), (nn.GroupNorm in kinds)) == (norm == "batch", norm == "group")


def test_with_group_norm_an_image_does_not_depend_on_the_others_of_its_batch():
    model, x = small(dropout=0.0), torch.randn(3, 3, 64, 64)
    assert_close(model(x)[0][1:2], model(x[1:2])[0], 1e-5)


def test_the_two_taps_read_different_things():
    x = torch.randn(1, 3, 64, 64)
    of_sum, of_mixer = (small(tap=tap).eval() for tap in ("sum", "mixer"))
    assert not torch.allclose(of_sum(x), of_mixer(x))
    model = vim.VisionMamba(**SMALL).eval()
    hidden = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True, tap="mixer")
    sums = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert_close(sums[1], sums[0] + hidden[1], 1e-5)  # the residual of a block is the sum before it


def test_the_heads_are_at_the_top_of_the_layers_and_the_embeddings_do_not_decay():
    model = small()
    groups = timm.models._manipulate.group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == {name for name, _ in model.named_parameters()}
    assert groups["backbone.model.patch_embed.proj.weight"] == 0
    assert [groups[f"backbone.model.layers.{i}.mixer.A_log"] for i in range(4)] == [1, 2, 3, 4]
    top = {name: layer for name, layer in groups.items() if not name.startswith("backbone.model")}
    assert set(top.values()) == {5}
    assert model.no_weight_decay() == {"backbone.model.pos_embed"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "layer"}, "norm must be one of .*'layer'"),
        ({"tap": "both"}, "tap must be one of .*'both'"),
        ({"blocks": (0, 1, 2, 4)}, "blocks must be four of 0 to 3"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="num_classes must be >= 2, got 1"):
        Segmenter(vim.VisionMamba(**SMALL), 1)


def test_the_final_norm_of_the_mixers_output_is_refused():
    with pytest.raises(ValueError, match="norm must be False with tap='mixer'"):
        vim.VisionMamba(**SMALL).forward_intermediates(torch.randn(1, 3, 64, 64), norm=True, tap="mixer")


@pytest.mark.parametrize("norm", ["group", pytest.param("batch", marks=pytest.mark.slow)])
def test_a_segmenter_exports_to_onnx_with_any_batch(tmp_path, norm):
    backbone = vim.VisionMamba(**SMALL, directions="none")  # half of the scans to export
    model = Segmenter(backbone, 3, aux_channels=8, channels=8, norm=norm).eval()
    checked = write_checked(model, tmp_path / "model.onnx", FORMATS["onnx"], torch.randn(4, 3, 64, 64), tolerance=1e-4)
    assert checked.difference < 1e-4
