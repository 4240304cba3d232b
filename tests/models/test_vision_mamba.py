"""The model's surface: names in timm, kinds, pooling, sizes, initialisation, compilation, bad arguments."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_data_config

import vim
from tests.helpers import assert_close
from tests.models.small import images, small
from vim.layers.token_sequence import extract_tokens

SIZES = {
    "vim_tiny_patch16_224": 7_148_008,
    "vim_small_patch16_224": 25_796_584,
    "vim_base_patch16_224": 97_598_440,
    "vim_tiny_patch16_stride8_224": 7_250_344,
    "vim_small_patch16_stride8_224": 26_001_256,
}
LONG_NAMES = {
    "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2": "vim_tiny_patch16_224",
    "vim_small_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2": "vim_small_patch16_224",
    "vim_tiny_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2": (
        "vim_tiny_patch16_stride8_224"
    ),
    "vim_small_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2": (
        "vim_small_patch16_stride8_224"
    ),
    "vim_base_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2": "vim_base_patch16_224",
}
ROPE_TINY = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_rope_also_residual_with_cls_token"
FILES = {
    "vim_tiny_patch16_224": ("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth"),
    "vim_tiny_patch16_stride8_224": ("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth"),
    "vim_small_patch16_224": ("hustvl/Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth"),
    "vim_small_patch16_stride8_224": ("hustvl/Vim-small-midclstok", "vim_s_midclstok_ft_81p6acc.pth"),
    "vim_base_patch16_224": ("hustvl/Vim-base-midclstok", "vim_b_midclstok_81p9acc.pth"),
    ROPE_TINY: ("hustvl/Vim-tiny", "vim_tiny_73p1.pth"),
}


@pytest.mark.parametrize("name", [*SIZES, *LONG_NAMES])
def test_registered_sizes(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == SIZES[LONG_NAMES.get(name, name)]
    assert model.depth == 24


def test_the_retired_rope_model():
    with torch.device("meta"):
        model = timm.create_model(ROPE_TINY)
    assert (model.cls_position, model.rotary) == ("head", "residual")
    assert all(block.mixer.merge == "sum" for block in model.layers)
    assert {"rope.freqs_cos", "rope.freqs_sin"} < set(model.state_dict())


@pytest.mark.parametrize("name", [*SIZES, *LONG_NAMES, ROPE_TINY])
def test_default_cfg_is_the_originals_evaluation(name):
    cfg = timm.get_pretrained_cfg(name)
    assert (cfg.hf_hub_id, cfg.hf_hub_filename) == FILES[LONG_NAMES.get(name, name)]
    data = resolve_data_config(pretrained_cfg=cfg.to_dict())
    assert data["input_size"] == (3, 224, 224)
    assert (data["crop_pct"], data["interpolation"]) == (0.875, "bicubic")
    assert (data["mean"], data["std"]) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert (cfg.first_conv, cfg.classifier) == ("patch_embed.proj", "head")


@pytest.mark.parametrize("position", ["none", "head", "middle", "double", "random"])
def test_forward_features_puts_class_tokens_first(position):
    model = small(cls_position=position).eval()
    tokens = model.forward_features(images())
    assert tokens.shape == (2, 16 + model.num_prefix_tokens, 32)
    assert model.num_prefix_tokens == {"none": 0, "double": 2}.get(position, 1)


def test_the_middle_token_moves_to_the_front_and_patches_keep_their_order():
    model = small().eval()
    seen = []
    model.norm_f.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    canonical = model.forward_features(images())
    (token,), patches = extract_tokens(seen[0], (8,))
    assert torch.equal(canonical, torch.cat([token, patches], 1))


@pytest.mark.parametrize("size", [32, (24, 40)])
def test_pooling(size):
    tokens = torch.randn(2, 18, 32)
    assert torch.equal(small().pool(tokens[:, :17]), tokens[:, 0])
    assert torch.equal(small(global_pool="avg").pool(tokens[:, :17]), tokens[:, 1:17].mean(1))
    assert torch.equal(small(global_pool="").pool(tokens), tokens)
    assert_close(small(cls_position="double").pool(tokens), (tokens[:, 0] + tokens[:, 1]) / 2, 1e-6)
    bare = small(cls_position="none", global_pool="max")
    assert torch.equal(bare.pool(tokens), tokens)
    assert torch.equal(bare.forward_head(tokens), bare.head(tokens).max(1).values)
    assert torch.equal(small(cls_position="none", global_pool="last").pool(tokens), tokens[:, -1])


def test_classifier():
    model = small()
    assert model.get_classifier() is model.head
    model.reset_classifier(7, "avg")
    assert model(images()).shape == (2, 7)
    assert (model.num_classes, model.global_pool) == (7, "avg")
    model.reset_classifier(0, "")
    assert model(images()).shape == (2, 17, 32)


def test_a_random_position_is_drawn_in_each_call():
    model = small(cls_position="random").eval()
    torch.manual_seed(0)
    outputs = [model(images()) for _ in range(8)]
    assert any(not torch.allclose(outputs[0], other) for other in outputs[1:])
    fixed = [model.forward_head(model.forward_features(images(), cls_index=5)) for _ in range(2)]
    assert torch.equal(*fixed)


def test_token_shuffle_is_drawn_in_each_call():
    model = small(token_shuffle=True).eval()
    torch.manual_seed(0)
    assert not torch.allclose(model(images()), model(images()))
    same_order = model.forward_features(images(), token_order=torch.arange(17))
    model.token_shuffle = False
    assert torch.equal(same_order, model.forward_features(images()))


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_flip_ratio(ratio):
    model = small(flip_ratio=ratio).eval()
    plain = copy.deepcopy(model)
    plain.flip_ratio = 0.0
    straight = plain(images())
    torch.manual_seed(0)
    flipped = sum(not torch.allclose(model(images()), straight) for _ in range(40))
    assert {0.0: flipped == 0, 0.5: 8 < flipped < 32, 1.0: flipped == 40}[ratio]


def test_stochastic_depth_as_the_original_schedules_it():
    model = small(depth=5, drop_path_rate=0.4)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.layers]
    assert rates == pytest.approx([0.0, 0.0, 0.1, 0.2, 0.3])
    assert model.drop_path.drop_prob == pytest.approx(0.4)
    assert small().drop_path.drop_prob == pytest.approx(0.1), "the original's default"


def test_stochastic_depth_acts_in_training_only():
    model = small(drop_path_rate=0.5)
    torch.manual_seed(0)
    outputs = [model(images()) for _ in range(8)]
    assert any(not torch.allclose(outputs[0], other) for other in outputs[1:])
    model.eval()
    assert torch.equal(model(images()), model(images()))


def test_initialisation_by_moments():
    torch.manual_seed(0)
    model = vim.VisionMamba(img_size=64, patch_size=8, embed_dim=256, depth=4, num_classes=500)
    proj = model.patch_embed.proj
    assert abs(proj.weight.std().item() * math.sqrt(3 * 64) - 1) < 0.03  # LeCun normal
    assert proj.weight.abs().max() < 2.3 / math.sqrt(3 * 64), "truncated at two standard deviations"
    assert torch.count_nonzero(proj.bias) == 0
    for tensor in (model.pos_embed, model.cls_token, model.head.weight):
        assert abs(tensor.std().item() / 0.02 - 1) < 0.15
    assert torch.count_nonzero(model.head.bias) == 0
    for block in model.layers:
        bound = math.sqrt(1 / 512)
        assert abs(block.mixer.out_proj.weight.abs().max().item() / (bound / math.sqrt(4)) - 1) < 0.01
        assert abs(block.mixer.in_proj.weight.abs().max().item() * 16 - 1) < 0.01
        assert abs(block.mixer.in_proj.weight.std().item() * 16 * math.sqrt(3) - 1) < 0.02
        assert torch.equal(block.norm.weight, torch.ones(256))
    biased = small(bias=True)
    assert all(torch.count_nonzero(b.mixer.in_proj.bias) == 0 for b in biased.layers)
    assert all(torch.count_nonzero(b.mixer.out_proj.bias) == 0 for b in biased.layers)
    assert all(torch.count_nonzero(b.mixer.dt_proj.bias) > 0 for b in biased.layers)


@pytest.mark.parametrize("kwargs", [{}, {"rotary": "hidden"}, {"norm": "layer", "layer_scale": 0.1, "bias": True}])
def test_weights_after_meta_and_to_empty(kwargs):
    with torch.device("meta"):
        model = small(**kwargs)
    model = model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    torch.manual_seed(0)
    model.init_weights()
    reference = small(**kwargs)
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all(), name
        wanted = reference.state_dict()[name]
        if wanted.numel() > 500:
            assert abs(tensor.std().item() - wanted.std().item()) <= 0.15 * wanted.std().item(), name


def test_rotary_tables_follow_the_size():
    model = small(rotary="residual", dynamic_img_size=True).eval()
    dynamic = model(images(48, 64))
    model.set_input_size((48, 64))
    assert model.rope.freqs_cos.shape == (48, 32)
    assert_close(dynamic, model(images(48, 64)), 1e-5)


def test_gradient_checkpointing_changes_no_number():
    model = small().train()
    model.drop_path_rate = 0.0
    torch.manual_seed(0)
    model(images()).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    torch.manual_seed(0)
    model(images()).sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], 1e-5, name)


def test_deepcopy_pickle_and_state_dict_round_trip():
    model = small(rotary="hidden").eval()
    expected = model(images())
    assert torch.equal(copy.deepcopy(model)(images()), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images()), expected)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = small(rotary="hidden", drop_path_rate=0.0).eval()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(images()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_and_device_arguments(dtype):
    model = small(dtype=dtype, device="cpu").eval()
    assert all(p.dtype == dtype for p in model.parameters())
    assert model(images().to(dtype)).dtype == dtype


@pytest.mark.parametrize("kwargs", [{}, {"directions": "v1"}, {"directions": "none", "pairwise_layers": True}], ids=str)
def test_compiles_without_graph_breaks(kwargs):
    model = small(depth=2, drop_path_rate=0.0, **kwargs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(images()), model(images()), 1e-5)
    actual = torch.autograd.grad(compiled(images()).square().sum(), list(model.parameters()))
    expected = torch.autograd.grad(model(images()).square().sum(), list(model.parameters()))
    for got, wanted in zip(actual, expected, strict=True):
        assert_close(got, wanted, 1e-4)


def test_compiles_with_inductor():
    model = small(depth=1, drop_path_rate=0.0)
    compiled = torch.compile(model, fullgraph=True)
    assert_close(compiled(images()), model(images()), 1e-5)


def test_flops_of_tiny():
    from torch.utils.flop_counter import FlopCounterMode

    model = timm.create_model("vim_tiny_patch16_224").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    tokens, dense = 197, 24 * 197 * 384 * (2 * 192 + 2 * 44 + 2 * 12 + 192 + 2 * 4) + 196 * 768 * 192 + 192 * 1000
    scan = 9 * tokens * 384 * 16 * 2 * 24
    norms = 25 * 5 * tokens * 192
    assert counter.get_total_flops() == 2 * dense + scan + norms
    assert dense == pytest.approx(1.29e9, rel=0.01)
    assert scan == pytest.approx(0.52e9, rel=0.01)


def test_dropout_before_the_head_is_a_module_that_can_be_left_on():
    """Monte-Carlo dropout: the model in evaluation mode, its dropout not."""
    model = small(drop_rate=0.5, drop_path_rate=0.0).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
        for module in dropouts:
            module.train()
        assert not torch.equal(model(x), model(x))
    assert model.head_drop.p == 0.5
    assert model.head_drop in dropouts
    assert list(model.state_dict()) == list(small().state_dict())


@pytest.mark.parametrize("kwargs", [{}, {"cls_position": "none"}, {"cls_position": "double"}, {"pos_embed": "none"}])
def test_only_parameters_that_there_are_are_kept_from_weight_decay(kwargs):
    model = small(**kwargs)
    assert model.no_weight_decay() == {n for n, _ in model.named_parameters() if n in ("pos_embed",) or "cls_tok" in n}
