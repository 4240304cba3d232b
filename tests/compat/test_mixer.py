"""mamba-ssm's `Mamba` and `Block`: constructor, state dict, generation with states."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vim
from tests.helpers import TOLERANCES, assert_close
from vim.compat.mamba_ssm import Block, Block1, Mamba, RMSNorm

RTOL = TOLERANCES[torch.float32].gradient


def test_state_dict_and_positional_arguments_of_mamba_ssm():
    mixer = Mamba(32, 8, 3, 2, 5, 0.01, 0.05, "constant", 2.0, 1e-3, True, False, True, 7, "cpu", torch.float64)
    shapes = {name: tuple(t.shape) for name, t in mixer.state_dict().items()}
    assert shapes == {
        "A_log": (64, 8),
        "D": (64,),
        "in_proj.weight": (128, 32),
        "conv1d.weight": (64, 1, 3),
        "conv1d.bias": (64,),
        "x_proj.weight": (5 + 16, 64),
        "dt_proj.weight": (64, 5),
        "dt_proj.bias": (64,),
        "out_proj.weight": (32, 64),
    }
    assert (mixer.layer_idx, mixer.D.dtype, mixer.directions) == (7, torch.float64, "none")
    assert torch.equal(mixer.dt_proj.weight, torch.full_like(mixer.dt_proj.weight, 2 * 5**-0.5))
    assert 0.01 - 1e-6 <= F.softplus(mixer.dt_proj.bias).min() <= F.softplus(mixer.dt_proj.bias).max() <= 0.05 + 1e-6


def test_the_arguments_of_the_fork():
    named = {"bimamba_type": "v2", "if_devide_out": True, "init_layer_scale": 0.1}
    for mixer in (Mamba(32, **named), Mamba(32, bimamba_type="v2", if_divide_out=True, init_layer_scale=0.1)):
        assert (mixer.directions, mixer.merge, mixer.layer_scale) == ("v2", "mean", 0.1)
        assert {"A_b_log", "D_b", "conv1d_b.weight", "gamma"} <= mixer.state_dict().keys()
    torch.manual_seed(0)
    own = vim.Mamba(32, merge="mean", layer_scale=0.1)
    mixer.load_state_dict(own.state_dict())
    x = torch.randn(2, 5, 32)
    assert_close(mixer(x), own(x), RTOL)


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ({"bimamba_type": "v3"}, ValueError, "bimamba_type must be 'none', 'v1' or 'v2', got 'v3'"),
        ({"nslices": 4}, TypeError, "mixer has no argument 'nslices'"),
        ({"dt_init": "zero"}, ValueError, "dt_init must be one of.*'zero'"),
    ],
    ids=str,
)
def test_arguments_that_are_refused(named, error, message):
    with pytest.raises(error, match=message):
        Mamba(32, **named)


@pytest.mark.parametrize("prompt", [1, 2, 6])
def test_generation_with_states_equals_the_whole_sequence(prompt):
    torch.manual_seed(0)
    mixer = Mamba(16, layer_idx=3)
    x = torch.randn(2, 9, 16)
    whole = mixer(x)
    params = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0, max_seqlen=9)
    assert_close(mixer(x[:, :prompt], inference_params=params), whole[:, :prompt], RTOL)
    assert list(params.key_value_memory_dict) == [3]
    for i in range(prompt, 9):
        params.seqlen_offset = i
        assert_close(mixer(x[:, i : i + 1], inference_params=params), whole[:, i : i + 1], RTOL)
    params.seqlen_offset = 0
    assert_close(mixer(x, inference_params=params), whole, RTOL)


def test_generation_needs_a_key_for_the_layer():
    with pytest.raises(ValueError, match="layer_idx must be given"):
        Mamba(16)(torch.randn(1, 2, 16), inference_params=SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0))


def test_generation_in_two_directions_is_refused():
    params = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    with pytest.raises((ValueError, RuntimeError), match="directions"):
        Mamba(16, bimamba_type="v2", layer_idx=0)(torch.randn(1, 2, 16), inference_params=params)


def test_torch_fx_records_a_mixer_as_one_node():
    model = nn.Sequential(Mamba(16))
    x = torch.randn(1, 4, 16)
    assert_close(torch.fx.symbolic_trace(model)(x), model(x), RTOL)


@pytest.mark.parametrize("fp32", [True, False])
def test_blocks(fp32):
    torch.manual_seed(0)
    block = Block1(16, Mamba, RMSNorm, residual_in_fp32=fp32)
    with_mlp = Block(16, Mamba, lambda dim: nn.Linear(dim, dim), RMSNorm, residual_in_fp32=fp32)
    assert "norm2.weight" in with_mlp.state_dict()
    x = torch.randn(2, 5, 16)
    y, total = block(x)
    assert torch.equal(total, x)
    assert_close(y, block.mixer(block.norm(x)), RTOL)
    z, total = with_mlp(y, total)
    middle = with_mlp.mixer(with_mlp.norm(x + y))
    assert_close(total, x + y + middle, RTOL)
    assert_close(z, with_mlp.mlp(with_mlp.norm2(total)), RTOL)
