"""The original's arguments in ours."""

from __future__ import annotations

import pytest
import torch

import vim
from vim.checkpoints.upstream import translate_mixer_args, translate_model_args


def test_the_originals_defaults_are_ours_where_we_follow_it():
    translated = translate_model_args()
    model = vim.VisionMamba(**{**translated, "device": "meta"})
    assert (model.embed_dim, model.depth, model.num_classes, model.cls_position) == (192, 24, 1000, "middle")
    assert (model.global_pool, model.layers[0].mixer.directions, model.layers[0].mixer.merge) == ("token", "v2", "mean")
    assert model.drop_path.drop_prob == pytest.approx(0.1)
    assert model.patch_embed.stride == (16, 16)


def test_the_stride_does_not_follow_the_patch_size():
    assert translate_model_args(patch_size=8)["patch_stride"] == 16


@pytest.mark.parametrize(
    ("upstream", "ours"),
    [
        ({"channels": 1}, {"in_chans": 1}),
        ({"img_size": [32, 48]}, {"img_size": (32, 48)}),
        ({"if_cls_token": False}, {"cls_position": "none", "global_pool": "last"}),
        ({"if_cls_token": False, "final_pool_type": "mean"}, {"global_pool": "avg"}),
        ({"if_cls_token": False, "final_pool_type": "max"}, {"global_pool": "max"}),
        ({"if_cls_token": False, "final_pool_type": "all"}, {"global_pool": ""}),
        ({"final_pool_type": "mean"}, {"global_pool": "token"}),
        ({"use_middle_cls_token": False}, {"cls_position": "head"}),
        ({"use_double_cls_token": True}, {"cls_position": "double"}),
        ({"if_random_cls_token_position": True}, {"cls_position": "middle"}),
        ({"if_random_cls_token_position": True, "use_middle_cls_token": False}, {"cls_position": "random"}),
        ({"if_random_token_rank": True}, {"token_shuffle": True}),
        ({"if_rope": True}, {"rotary": "hidden"}),
        ({"if_rope": True, "if_rope_residual": True}, {"rotary": "residual"}),
        ({"if_rope_residual": True}, {"rotary": "none"}),
        ({"if_rope": True, "ft_seq_len": 14, "pt_hw_seq_len": 7}, {"rotary": "hidden", "rotary_side": 7}),
        ({"if_abs_pos_embed": False}, {"pos_embed": "none"}),
        ({"if_bidirectional": True, "bimamba_type": "none"}, {"pairwise_layers": True, "directions": "none"}),
        ({"if_bimamba": True}, {"directions": "v1", "merge": "sum"}),
        ({"bimamba_type": "v1", "if_divide_out": True}, {"directions": "v1", "merge": "sum"}),
        ({"if_divide_out": False}, {"merge": "sum"}),
        ({"if_devide_out": False}, {"merge": "sum"}),
        ({"flip_img_sequences_ratio": -1}, {"flip_ratio": 0.0}),
        ({"flip_img_sequences_ratio": 0.3}, {"flip_ratio": 0.3}),
        ({"rms_norm": False, "norm_epsilon": 1e-6}, {"norm": "layer", "norm_eps": 1e-6}),
        ({"init_layer_scale": 0.1}, {"layer_scale": 0.1}),
        ({"drop_rate": 0.1, "drop_path_rate": 0.2}, {"pos_drop_rate": 0.1, "drop_path_rate": 0.2}),
        ({"ssm_cfg": {"d_conv": 3, "expand": 1, "use_fast_path": False}}, {"d_conv": 3, "expand": 1}),
        ({"fused_add_norm": False, "residual_in_fp32": False}, {"norm": "rms"}),
    ],
    ids=str,
)
def test_model_arguments(upstream, ours):
    translated = translate_model_args(**upstream)
    assert {name: translated[name] for name in ours} == ours
    vim.VisionMamba(**{**translated, "depth": 1, "device": "meta"})


@pytest.mark.parametrize(
    ("upstream", "error", "message"),
    [
        ({"if_cls_tokn": True}, TypeError, "no argument 'if_cls_tokn'"),
        ({"if_divide_out": True, "if_devide_out": True}, TypeError, "two spellings of one argument"),
        ({"final_pool_type": "max"}, ValueError, "final_pool_type='max' with if_cls_token=True is refused"),
        ({"final_pool_type": "token"}, ValueError, "final_pool_type must be one of.*'token'"),
        ({"bimamba_type": "v3"}, ValueError, "bimamba_type must be.*'v3'"),
        ({"initializer_cfg": {"n_residuals_per_layer": 2}}, ValueError, "scale the weight of `out_proj`"),
        ({"initializer_cfg": {"std": 1}}, TypeError, "has no argument 'std' .in initializer_cfg"),
        ({"ssm_cfg": {"device": "meta"}}, ValueError, r"ssm_cfg\['device'\] must be None in a model, got 'meta'"),
        ({"ssm_cfg": {"d_con": 3}}, TypeError, "no argument 'd_con'"),
        ({"ssm_cfg": {"dt_min": 0.01}}, ValueError, r"ssm_cfg\['dt_min'\] changes initial weights only.*to 0.01, then"),
        ({"if_rope": True, "ft_seq_len": 24}, ValueError, r"ft_seq_len must be the side of the grid, \[14\], got 24"),
    ],
    ids=str,
)
def test_model_arguments_that_are_refused(upstream, error, message):
    with pytest.raises(error, match=message):
        translate_model_args(**upstream)


def test_mixer_arguments():
    translated = translate_mixer_args(d_model=32)
    assert (translated["d_model"], translated["directions"], translated["merge"]) == (32, "none", "sum")
    assert translate_mixer_args(bimamba_type="v2", if_divide_out=True)["merge"] == "mean"
    assert translate_mixer_args(bimamba_type="v1", if_divide_out=True)["merge"] == "sum"
    assert translate_mixer_args(init_layer_scale=0.1)["layer_scale"] == 0.1
    vim.Mamba(**translate_mixer_args(d_model=32, layer_idx=3, use_fast_path=False, dt_min=0.01, dt_rank=5))
    with pytest.raises(TypeError, match="mixer has no argument 'bimamba'"):
        translate_mixer_args(bimamba="v2")
    assert vim.Mamba(**translate_mixer_args(d_model=32, dt_init="constant")).dt_init == "constant"


def test_initial_step_sizes_in_a_model_as_the_refusal_says():
    with pytest.raises(ValueError, match=r"set `dt_init` of the mixer of each block in `model.layers` to 'constant'"):
        translate_model_args(ssm_cfg={"dt_init": "constant"})
    model = vim.VisionMamba(img_size=32, embed_dim=32, depth=2)
    for block in model.layers:
        block.mixer.dt_init = "constant"
    model.init_weights()
    for block in model.layers:
        assert torch.equal(block.mixer.dt_proj.weight, torch.full((64, 2), 2**-0.5))
        assert torch.equal(block.mixer.dt_proj_b.weight, torch.full((64, 2), 2**-0.5))


def test_initializer_settings_without_effect_are_taken():
    defaults = {"initializer_range": 0.1, "rescale_prenorm_residual": True, "n_residuals_per_layer": 1}
    assert translate_model_args(initializer_cfg=defaults) == translate_model_args()
