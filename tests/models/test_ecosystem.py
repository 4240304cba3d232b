"""What users do with a timm model: hub folders, layer-wise decay, adapters, torch.func, int8, any size."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import timm
import timm.optim
import torch
from huggingface_hub.errors import EntryNotFoundError

import vim
from tests.helpers import assert_close

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


def test_timm_backbone_of_transformers():
    transformers = pytest.importorskip("transformers", reason='needs pip install "vimamba[dense]"')
    config = transformers.TimmBackboneConfig(backbone=NAME, out_indices=[0, 2], use_pretrained_backbone=False)
    backbone = transformers.TimmBackbone(config).eval()
    maps = backbone(torch.randn(1, 3, 224, 224)).feature_maps
    assert [tuple(m.shape) for m in maps] == [(1, 192, 14, 14)] * 2


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
