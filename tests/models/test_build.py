"""Models come from timm by name, and a slip in a name or an argument is named."""

from __future__ import annotations

import pytest
import torch

import vim
from tests.tiny_runs import tiny_config
from vim.models.build import build_model, check_model_name, describe_model
from vim.runtime.device import resolve_device


def test_the_settings_reach_the_model():
    config = tiny_config(model__in_chans=3, model__img_size=(16, 24), model__drop_rate=0.3).model
    model = build_model(config, 7)
    assert isinstance(model, vim.VisionMamba)
    assert model(torch.randn(2, 3, 16, 24)).shape == (2, 7)
    assert (model.depth, model.embed_dim, model.head_drop.p) == (1, 16, 0.3)
    assert describe_model(model, config).startswith("vim_tiny_patch16_224 (patch_size=8, embed_dim=16, depth=1")


def test_a_model_without_an_image_size_is_built_too():
    model = build_model(tiny_config(model__name="resnet10t", model__args={}).model, 4).eval()
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 4)


def test_an_unknown_model_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="got 'vim_tiny_patch16_244': did you mean 'vim_tiny_patch16_224'"):
        check_model_name("vim_tiny_patch16_244")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"dept": 3}, "model.args does not fit .* unexpected keyword argument 'dept': did you mean 'depth'?"),
        ({"depth": 0}, "depth must be .* got 0"),
    ],
)
def test_an_argument_that_the_model_refuses_is_named(args, message):
    with pytest.raises(ValueError, match=message):
        build_model(tiny_config(model__args=args).model, 4)


def test_a_device_that_is_not_there_is_refused():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match=r"device must be .* got 'gpu'"):
        resolve_device("gpu")
    with pytest.raises(ValueError, match="device must be one that PyTorch finds on this machine, got 'cuda:99'"):
        resolve_device("cuda:99")
