"""What users do with a timm model: hub folders, adapters, torch.func, int8, any size, graphs, hooks."""

from __future__ import annotations

import inspect
import shutil
from types import SimpleNamespace

import pytest
import timm
import timm.optim
import torch
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

import vim
from tests.helpers import assert_close
from vim.checkpoints import upstream
from vim.layers import LayerNorm
from vim.layers.arguments import ORIGINAL_NAMES
from vim.ops import default_backend

NAME = "vim_tiny_patch16_224"
SMALL = {"img_size": 64, "depth": 2, "num_classes": 10}


def small(**kwargs) -> vim.VisionMamba:
    """The tiny model with two blocks."""
    torch.manual_seed(0)
    return timm.create_model(NAME, **{**SMALL, **kwargs})


def images(*size: int) -> torch.Tensor:
    """Two random images."""
    return torch.randn(2, 3, *(size or (64, 64)), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_for_the_hub_gives_the_model_back(safe, tmp_path):
    model = small().eval()
    model.set_input_size((64, 96))
    model.reset_classifier(7, "avg")
    timm.models.save_for_hf(model, tmp_path, safe_serialization=safe)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(other(images(64, 96)), model(images(64, 96)))
    assert (other.num_classes, other.global_pool, other.patch_embed.img_size) == (7, "avg", (64, 96))
    resized = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=(128, 64), num_classes=3).eval()
    model.set_input_size((128, 64))
    assert torch.equal(resized.pos_embed, model.pos_embed)


def test_a_model_made_of_averaged_weights_comes_back_too(tmp_path):
    model = small(pretrained_weights="ema").eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(other(images()), model(images()))


def test_layer_wise_decay():
    model = small()
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    scales, decays = {}, {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            scales[names[id(parameter)]] = group["lr_scale"]
            decays[names[id(parameter)]] = group["weight_decay"]
    assert len(scales) == len(names)
    order = ["pos_embed", "layers.0.mixer.A_log", "layers.1.mixer.in_proj.weight", "head.weight"]
    assert [scales[name] for name in order] == [0.125, 0.25, 0.5, 1.0]
    assert scales["cls_token"] == scales["patch_embed.proj.weight"] == 0.125
    assert scales["norm_f.weight"] == 0.5, "with the last block, as in timm's vision transformers"
    assert decays["pos_embed"] == decays["cls_token"] == decays["layers.0.mixer.D"] == 0
    assert decays["layers.0.mixer.A_log"] == 0.05, "as in the original's recipe"


@pytest.mark.slow
def test_timm_backbone_of_transformers():
    transformers = pytest.importorskip("transformers", reason='needs pip install "vimamba[dense]"')
    config = transformers.TimmBackboneConfig(backbone=NAME, out_indices=[0, 2], use_pretrained_backbone=False)
    backbone = transformers.TimmBackbone(config).eval()
    maps = backbone(torch.randn(1, 3, 224, 224)).feature_maps
    assert [tuple(m.shape) for m in maps] == [(1, 192, 14, 14)] * 2


@pytest.mark.slow
def test_lora_changes_the_output_and_trains():
    peft = pytest.importorskip("peft", reason='needs pip install "vimamba[dense]"')
    model = small(drop_path_rate=0.0)
    before = model(images()).detach()
    targets = ["in_proj", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "out_proj"]
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, lora_dropout=0.0)
    )
    assert (adapted(images()) - before).abs().max() > 0.01
    adapters = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * 6 * 2
    optimizer = torch.optim.SGD(adapters.values(), lr=0.1)
    losses = []
    for _ in range(4):
        loss = torch.nn.functional.cross_entropy(adapted(images()), torch.tensor([1, 2]))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in adapters.values())
        optimizer.step()
    assert losses[-1] < losses[0]
    merged = adapted.merge_and_unload()
    assert_close(merged(images()), adapted(images()), 1e-5)


def test_torch_func():
    model = small(drop_path_rate=0.0)
    parameters = dict(model.named_parameters())

    def call(parameters, x):
        return torch.func.functional_call(model, parameters, (x,))

    model(images()).sum().backward()
    grads = torch.func.grad(lambda p: call(p, images()).sum())(parameters)
    for name, parameter in parameters.items():
        assert_close(grads[name], parameter.grad, 1e-5, name)
    assert_close(torch.func.vmap(lambda x: call(parameters, x[None])[0])(images()), model(images()), 1e-5)
    each = torch.func.vmap(torch.func.grad(lambda p, x: call(p, x[None]).sum()), in_dims=(None, 0))
    for name, grad in each(parameters, images()).items():
        assert_close(grad.sum(0), grads[name], 1e-4, name)


def test_a_forward_hook_fires_on_every_module_that_runs():
    model, fired = small().eval(), set()
    expected = model(images())
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: fired.add(name))
    assert_close(model(images()), expected, 1e-5)
    silent = {name for name, _ in model.named_modules()} - fired
    # A list is no step of the computation, and nothing came before the first block that it could drop.
    assert silent == {"layers", "layers.0.drop_path"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_int8_weights_and_activations_on_real_images():
    """A small model trained on digits decides as before when its linear layers are int8."""
    quantization = pytest.importorskip("torchao.quantization", reason='needs pip install "vimamba[dense]"')
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    y = torch.from_numpy(digits.target)
    torch.manual_seed(0)
    model = vim.VisionMamba(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=3, drop_path_rate=0.0
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(3):
        for chosen in torch.randperm(1437).split(48):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        expected = model(x[1437:])
        quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
        actual = model(x[1437:])
    assert "Int8" in str(type(model.layers[0].mixer.in_proj.weight))
    agreement = (actual.argmax(1) == expected.argmax(1)).float().mean().item()
    accuracy = [(logits.argmax(1) == y[1437:]).float().mean().item() for logits in (expected, actual)]
    print(f"top-1 agreement {agreement:.4f}, accuracy {accuracy[0]:.4f} -> {accuracy[1]:.4f}")
    assert accuracy[0] > 0.85
    assert agreement >= 0.98
    assert not torch.equal(actual, expected)


@pytest.mark.parametrize("size", [(32, 32), (48, 112), (224, 64), (16, 256)], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"patch_stride": 8}, {"cls_position": "none"}], ids=str)
def test_a_resized_model_equals_one_built_at_that_size(size, kwargs):
    resized, built = small(**kwargs).eval(), small(img_size=size, **kwargs).eval()
    dynamic = small(dynamic_img_size=True, **kwargs).eval()
    dynamic.load_state_dict(resized.state_dict())
    resized.set_input_size(size)
    built.load_state_dict(resized.state_dict())
    x = images(*size)
    assert torch.equal(built(x), resized(x))
    assert_close(dynamic(x), resized(x), 1e-5)


class FolderHub:
    """A hub in a folder, in place of the functions of huggingface_hub that timm calls."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        monkeypatch.setattr(timm.models._hub, "HfApi", lambda **kwargs: self)
        monkeypatch.setattr(timm.models._hub, "hf_hub_download", self.download)

    def create_repo(self, repo_id, **kwargs):
        (self.folder / repo_id).mkdir(parents=True)
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(self, repo_id, filename, revision=None):
        return (self.folder / repo_id / filename).is_file()

    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)

    def download(self, repo_id, filename, **kwargs):
        if not self.file_exists(repo_id, filename):
            raise EntryNotFoundError(f"{repo_id} has no {filename}")
        return str(self.folder / repo_id / filename)


@pytest.mark.parametrize("safe", [True, False, "both"])
def test_a_model_pushed_to_the_hub_comes_back_by_its_name(safe, tmp_path, monkeypatch):
    FolderHub(tmp_path, monkeypatch)
    model = small(in_chans=1, cls_position="head", global_pool="avg").eval()
    timm.models.push_to_hf_hub(model, "someone/vim-small-digits", safe_serialization=safe)
    other = timm.create_model("hf-hub:someone/vim-small-digits", pretrained=True).eval()
    x = images()[:, :1]
    assert torch.equal(other(x), model(x))
    assert (other.cls_position, other.global_pool, other.depth, other.in_chans) == ("head", "avg", 2, 1)
    features = timm.create_model(
        "hf-hub:someone/vim-small-digits", pretrained=True, features_only=True, out_indices=(0, 1)
    ).eval()
    (last,) = model.forward_intermediates(x, indices=1, intermediates_only=True)
    assert torch.equal(features(x)[-1], last)


# ---- graphs ----------------------------------------------------------------------------------------------------------


def little(**kwargs) -> vim.VisionMamba:
    """A model of two blocks that takes no time, without stochastic depth."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "d_state": 4, "num_classes": 5}
    return vim.VisionMamba(**{**sizes, "drop_path_rate": 0.0, **kwargs})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_export_called_by_users(tmp_path):
    """Without a block of `exportable_ops` around it, and with gradients on; as Lightning's `to_onnx` calls it."""
    onnxruntime = pytest.importorskip("onnxruntime", reason='needs pip install "vimamba[export]"')
    pytest.importorskip("onnxscript", reason='needs pip install "vimamba[export]"')
    model, x = little(depth=1).eval(), images(32, 32)
    torch.onnx.export(model, (x,), tmp_path / "m.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(logits), model(x), 1e-5)
    with pytest.raises(RuntimeError, match=r"needs torch\.onnx\.export"):
        torch.onnx.export(model, (x,), tmp_path / "old.onnx", dynamo=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", [None, "reference"])
def test_jit_trace_with_its_own_check(backend):
    """It records the model with gradients and without, and refuses graphs that differ."""
    model = little().eval()
    with default_backend(backend):
        traced = torch.jit.trace(model, images(32, 32))
    x = torch.cat((images(32, 32), images(32, 32).flip(3)))
    assert_close(traced(x), model(x), 1e-5)
    traced(x).square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        assert_close(found[name], p.grad, 1e-5, name)


GRAPHS = {
    "plain": {},
    "layer norm": {"norm": "layer", "cls_position": "double", "directions": "v1"},
    "rotary": {"rotary": "residual", "cls_position": "head", "flip_ratio": 1.0},
    "pairwise": {"pairwise_layers": True, "directions": "none", "global_pool": "avg"},
    "pruned": {"cls_position": "none", "global_pool": "max"},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kwargs", GRAPHS.values(), ids=GRAPHS)
def test_symbolic_trace(kwargs, training):
    model = little(**kwargs).train(training)
    if kwargs == GRAPHS["pruned"]:
        model.prune_intermediate_layers([0], prune_norm=True, prune_head=False)
    graph = torch.fx.symbolic_trace(model)
    assert_close(graph(images(32, 32)), model(images(32, 32)), 1e-5)
    x = torch.cat((images(32, 32), images(32, 32)))
    assert_close(graph(x), model(x), 1e-5, "any batch")
    graph(x).square().sum().backward()
    assert all(p.grad is not None for p in model.layers[0].parameters())


def test_stochastic_depth_is_traced_and_drawn_in_each_call():
    model = little(drop_path_rate=0.9).train()
    graph = torch.fx.symbolic_trace(model)
    draws = []
    for _ in range(4):
        torch.manual_seed(len(draws))
        draws.append(graph(images(32, 32)))
        torch.manual_seed(len(draws) - 1)
        assert_close(draws[-1], model(images(32, 32)), 1e-5)
    assert not all(torch.equal(draw, draws[0]) for draw in draws)


def test_torchvisions_feature_extractor():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = little(drop_path_rate=0.1)
    nodes = {"layers.0.mixer": "mixer", "tokens": "tokens", "head": "head"}
    features = extraction.create_feature_extractor(model, return_nodes=nodes).eval()
    model.eval()
    mixed = []
    model.layers[0].mixer.register_forward_hook(lambda module, args, output: mixed.append(output))
    found = features(images(32, 32))
    assert_close(found["head"], model(images(32, 32)), 1e-5)
    assert_close(found["tokens"], model.forward_features(images(32, 32)), 1e-5)
    assert_close(found["mixer"], mixed[0], 1e-5)


@pytest.mark.parametrize(
    "kwargs", [{"cls_position": "random"}, {"token_shuffle": True}, {"flip_ratio": 0.5}, {"dynamic_img_size": True}]
)
def test_what_differs_between_calls_is_not_frozen_in_a_graph(kwargs):
    with pytest.raises(TypeError, match=f"torch.fx cannot trace a model with {next(iter(kwargs))}="):
        torch.fx.symbolic_trace(little(**kwargs))


class Twice(vim.Mamba):
    """A mixer that calls `vim.Mamba.forward`."""

    def forward(self, hidden_states):
        return super().forward(super().forward(hidden_states))


def test_a_hook_does_not_run_twice_in_a_graph():
    model = little()
    model.layers[0].mixer.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(TypeError, match=r"torch\.fx cannot trace Mamba with a hook"):
        torch.fx.symbolic_trace(model)
    with pytest.raises(TypeError, match=r"torch\.fx cannot trace Twice"):
        torch.fx.symbolic_trace(nn.Sequential(Twice(32)))
    with pytest.raises(TypeError, match="trace a module that holds it"):
        torch.fx.symbolic_trace(vim.Mamba(32))


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_blocks_in_a_sequence():
    torch.manual_seed(0)
    blocks = [vim.Block(vim.Mamba(32), vim.RMSNorm(32)) for _ in range(3)]
    x, residual = torch.randn(2, 17, 32), None
    found = nn.Sequential(*blocks)(x)
    for each in blocks:
        x, residual = each(x, residual)
    assert torch.equal(found[0], x)
    assert torch.equal(found[1], residual)
    with pytest.raises(TypeError, match="residual must be left out"):
        blocks[0](found, residual)


class OwnNorm(nn.Module):
    """A user's norm."""

    def forward(self, hidden, skip=None):
        total = hidden if skip is None else hidden + skip
        return nn.functional.normalize(total, dim=-1), total


def test_a_norm_that_takes_no_residual_is_refused():
    for norm in (nn.LayerNorm(32), nn.RMSNorm(32), nn.Identity(), vim.Mamba(32)):
        with pytest.raises(TypeError, match=r"vim.RMSNorm and vim.layers.LayerNorm do, got " + type(norm).__name__):
            vim.Block(vim.Mamba(32), norm)
    for norm in (OwnNorm(), LayerNorm(32)):
        out, _ = nn.Sequential(vim.Block(vim.Mamba(32), norm), vim.Block(vim.Mamba(32), norm))(torch.randn(2, 5, 32))
        assert out.shape == (2, 5, 32)


def test_the_originals_arguments_are_named_as_they_are_here():
    with pytest.raises(TypeError, match=r"bimamba_type is directions here; if_divide_out is merge .*translate_mixer"):
        vim.Mamba(32, bimamba_type="v2", if_divide_out=True)
    with pytest.raises(TypeError, match=r"is cls_position here; fused_add_norm is not needed here.*_model"):
        vim.VisionMamba(if_cls_token=True, fused_add_norm=True)
    with pytest.raises(TypeError, match=r"^VisionMamba\(\) got an unexpected keyword argument 'depht'$"):
        vim.VisionMamba(depht=3)


@pytest.mark.parametrize(
    ("cls", "names"),
    [(vim.Mamba, upstream.MIXER_DEFAULTS), (vim.VisionMamba, {**upstream.MODEL_DEFAULTS, **upstream.SYNONYMS})],
)
def test_all_of_the_originals_arguments_have_a_hint(cls, names):
    ours = set(inspect.signature(cls).parameters)
    assert set(names) <= ours | set(ORIGINAL_NAMES)
    ours |= set(inspect.signature(vim.VisionMamba).parameters)
    for name in set(names) & set(ORIGINAL_NAMES):
        assert set((ORIGINAL_NAMES[name] or "depth").split(", ")) <= ours, name


# ---- hooks -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_dynamic_quantisation_of_all_linear_layers():
    model, x = little(depth=6, embed_dim=64).eval(), images(32, 32)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    kinds = [type(module).__module__ for module in quantised.modules() if type(module).__name__ == "Linear"]
    assert kinds == ["torch.ao.nn.quantized.dynamic.modules.linear"] * (6 * 6 + 1)
    expected, actual = model(x), quantised(x)
    assert not torch.equal(actual, expected)
    assert_close(actual, expected, 0.05)


@pytest.mark.slow
def test_upernet_of_transformers_on_our_maps():
    transformers = pytest.importorskip("transformers", reason='needs pip install "vimamba[dense]"')
    backbone = transformers.TimmBackboneConfig(
        backbone="vim_tiny_pyramid_patch16_224", out_indices=[0, 1, 2, 3], use_pretrained_backbone=False
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=16, num_labels=5, use_auxiliary_head=False, pool_scales=[1, 2]
    )
    torch.manual_seed(0)
    model = transformers.UperNetForSemanticSegmentation(config)
    labels = torch.randint(5, (2, 64, 64))
    out = model(images(), labels=labels)
    assert out.logits.shape == (2, 5, 64, 64)
    out.loss.backward()
    used = [name for name, p in model.backbone.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert any("mixer.A_log" in name for name in used)


@pytest.mark.slow
def test_rt_detr_on_our_pyramid():
    """The detector takes the levels 1/8, 1/16 and 1/32."""
    transformers = pytest.importorskip("transformers", reason='needs pip install "vimamba[dense]"')
    backbone = transformers.TimmBackboneConfig(
        backbone="vim_tiny_pyramid_patch16_224", out_indices=[1, 2, 3], use_pretrained_backbone=False
    )
    config = transformers.RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=[192, 192, 192], freeze_backbone_batch_norms=False,
        d_model=32, encoder_hidden_dim=32, encoder_ffn_dim=32, decoder_in_channels=[32, 32, 32], decoder_ffn_dim=32,
        decoder_layers=1, encoder_layers=1, num_queries=10, num_denoising=0, num_labels=3, decoder_attention_heads=4,
        encoder_attention_heads=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.RTDetrForObjectDetection(config)
    labels = [{"class_labels": torch.tensor([i]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.4]])} for i in range(2)]
    out = model(images(), labels=labels)
    assert out.pred_boxes.shape == (2, 10, 4)
    out.loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "mixer.A_log" in name]
    assert any(g is not None and g.abs().sum() > 0 for g in gradients)
