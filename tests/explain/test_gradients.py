"""Class activation, gradients of pixels and receptive fields: what they show, and that they leave the model alone."""

from __future__ import annotations

import builtins
import threading

import numpy as np
import pytest
import timm
import torch

from tests.explain.test_attention import images, small_model
from vim.explain import class_activation, pixel_gradients, receptive_field
from vim.explain.class_activation import METHODS
from vim.explain.pixel_gradients import PIXEL_METHODS


@pytest.mark.parametrize("method", METHODS)
def test_methods_of_class_activation(method):
    maps = class_activation(small_model(), images(), [1, 4], method)
    assert maps.shape == (2, 32, 32)
    assert 0 <= maps.min() <= maps.max() <= 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"cls_position": "none"},
        {"cls_position": "head"},
        {"cls_position": "double"},
        {"cls_position": "random"},
        {"img_size": (16, 32), "patch_stride": 4},
        {"pairwise_layers": True, "depth": 4},
        {"depth": 1},
        {"flip_ratio": 1.0},
        {"token_shuffle": True},
        {"directions": "none"},
    ],
    ids=str,
)
def test_variants(arguments):
    model = small_model(**arguments)
    height, width = model.patch_embed.img_size
    pixels = torch.randn(1, 3, height, width)
    for maps in (class_activation(model, pixels, 0), pixel_gradients(model, pixels, 0)):
        assert maps.shape == (1, height, width)
        assert maps.max() > 0
    for token in ("center", "class") if model.num_prefix_tokens else ("center",):
        field = receptive_field(model, pixels, token)
        assert field.map.shape == (height, width)
        assert field.map.max() == 1


def test_class_activation_finds_the_patch_that_decides():
    """A head that answers to one patch alone: its place is the map's maximum, whatever the scan order."""
    model = small_model(cls_position="none", depth=1, token_shuffle=True)
    bright = torch.zeros(1, 3, 32, 32)
    bright[..., 8:16, 16:24] = 5.0  # row 1, column 2 of 4 x 4
    with torch.no_grad():
        model.pos_embed.zero_()
        model.head.weight[3] = model.forward_features(bright)[0].std(0)
    maps = class_activation(model, bright, 3, "hirescam")
    assert (maps[0] == maps.max()).nonzero().float().mean(0).tolist() == pytest.approx([11.5, 19.5], abs=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_another_precision(dtype):
    model, pixels = small_model().to(dtype), images().to(dtype)
    maps = [class_activation(model, pixels, 0), *(pixel_gradients(model, pixels, 0, m, steps=2) for m in PIXEL_METHODS)]
    for each in (*maps, receptive_field(model, pixels).map):
        assert each.dtype == torch.float32
        assert each.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert class_activation(small_model(), images(), 0).max() > 0


@pytest.mark.parametrize("method", PIXEL_METHODS)
def test_methods_of_pixel_gradients(method):
    model = small_model()
    weights = pixel_gradients(model, images(), torch.tensor([0, 2]), method, steps=4)
    assert weights.shape == (2, 32, 32)
    assert weights.min() >= 0
    assert torch.equal(weights, pixel_gradients(model, images(), [0, 2], method, steps=4))


def test_saliency_is_the_gradient():
    model = small_model()
    pixels = images().requires_grad_()
    (expected,) = torch.autograd.grad(model(pixels)[:, 3].sum(), pixels)
    torch.testing.assert_close(pixel_gradients(model, images(), 3), expected.abs().sum(1))


@pytest.mark.parametrize("explain", [class_activation, pixel_gradients])
def test_gradients_of_the_user_stay(explain):
    model = small_model(drop_rate=0.5).train()
    model.head.weight.requires_grad_(False)
    model(images()).sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    explain(model, images(), 1)
    assert model.training
    assert not model.head.weight.requires_grad
    assert model.head.bias.requires_grad
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in before)
        assert parameter.grad is None or torch.equal(parameter.grad, before[name])


@pytest.mark.parametrize("explain", [class_activation, pixel_gradients])
def test_frozen_models_are_explained_alike(explain):
    model = small_model()
    expected = explain(model, images(), 1)
    torch.testing.assert_close(explain(model.requires_grad_(False), images(), 1), expected)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (5, ValueError, "target must be from 0 to 4, got 5"),
        (-1, ValueError, "target must be from 0 to 4, got -1"),
        ([1], ValueError, "one class for each of 2 images, got 1"),
        (1.0, TypeError, "target must be a class number"),
        ("cat", TypeError, "target must be a class number"),
    ],
)
@pytest.mark.parametrize("explain", [class_activation, pixel_gradients])
def test_bad_targets(explain, target, error, message):
    with pytest.raises(error, match=message):
        explain(small_model(), images(), target)


def test_more_bad_input():
    with pytest.raises(ValueError, match="method must be one of"):
        class_activation(small_model(), images(), 0, "camera")
    with pytest.raises(ValueError, match="method must be one of"):
        pixel_gradients(small_model(), images(), 0, "camera")
    with pytest.raises(ValueError, match="steps must be an integer >= 1, got 0"):
        pixel_gradients(small_model(), images(), 0, steps=0)
    for explain in (class_activation, pixel_gradients, lambda m, x, _: receptive_field(m, x)):
        with pytest.raises(ValueError, match=r"at least one image, got \(0, 3, 32, 32\)"):
            explain(small_model(), images(0), 0)
    with pytest.raises(TypeError, match="_orig_mod"):
        class_activation(torch.compile(small_model()), images(), 0)
    for explain in (class_activation, pixel_gradients):
        with pytest.raises(ValueError, match="must have a head"):
            explain(small_model(num_classes=0), images(), 0)
        with pytest.raises(ValueError, match="must pool its tokens to explain a class, and its global_pool is ''"):
            explain(small_model(global_pool=""), images(), 0)
    with pytest.raises(TypeError, match="a classifier with an attribute num_classes, got Linear"):
        pixel_gradients(torch.nn.Linear(1, 1), images(), 0)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got str"):
        pixel_gradients("model", images(), 0)
    with pytest.raises(ValueError, match="its only layer has no partner"):
        class_activation(small_model(depth=1, pairwise_layers=True), images(), 0)
    with pytest.raises(ValueError, match="token must be 'center' for a model without a class token"):
        receptive_field(small_model(cls_position="none"), images(), "class")
    with pytest.raises(TypeError, match="forward_intermediates, got Linear"):
        receptive_field(torch.nn.Linear(1, 1), images())
    with torch.inference_mode():
        for explain in (class_activation, pixel_gradients, lambda m, x, t: receptive_field(m, x)):
            with pytest.raises(RuntimeError, match="inference_mode"):
                explain(small_model(), images(), 0)


@pytest.mark.parametrize("explain", [class_activation, pixel_gradients, lambda m, x, _: receptive_field(m, x)])
def test_a_model_made_under_inference_mode_is_refused_and_left_alone(explain):
    model = small_model()
    with torch.inference_mode():
        model.set_input_size((64, 64))
    with pytest.raises(RuntimeError, match=r"the parameter pos_embed was made inside torch.inference_mode\(\)"):
        explain(model, images(1, 64), 0)
    assert all(p.requires_grad for p in model.parameters())


def test_images_made_under_inference_mode_are_explained():
    with torch.inference_mode():
        pixels = images()
    assert class_activation(small_model(), pixels, 0).shape == (2, 32, 32)
    assert pixel_gradients(small_model(), pixels, 0).shape == (2, 32, 32)


def test_receptive_field_is_the_gradient_of_a_token():
    model = small_model()
    pixels = images(3).requires_grad_()
    ((patches, prefix),) = model.forward_intermediates(
        pixels, 1, return_prefix_tokens=True, norm=True, intermediates_only=True
    )
    for token, chosen in (("center", patches[:, :, 2, 2]), ("class", prefix.mean(1))):
        (gradient,) = torch.autograd.grad(chosen.sum(), pixels, retain_graph=True)
        expected = gradient.abs().sum((0, 1))
        field = receptive_field(model, images(3), token, batch_size=2)
        torch.testing.assert_close(field.map, expected / expected.max(), atol=1e-5, rtol=1e-4)
        assert field.center == ((20, 20) if token == "center" else (16, 16))


def test_receptive_field_of_other_models():
    deit = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=2, patch_size=8)
    assert receptive_field(deit, images(), "class").map.shape == (32, 32)
    resnet = timm.create_model("resnet10t", num_classes=2)
    assert receptive_field(resnet, torch.randn(1, 3, 64, 64)).map.shape == (64, 64)


def test_area_of_a_receptive_field():
    field = receptive_field(small_model(), images())
    assert 0 < field.area(0.2) <= field.area(0.5) <= field.area(0.99) <= field.area(1.0) == 1.0
    uniform = type(field)(torch.ones(100, 100), (50, 50))
    assert uniform.area(0.25) == pytest.approx(0.25, abs=0.03)
    for share in (0, 1.5):
        with pytest.raises(ValueError, match="share must be above 0 and at most 1"):
            field.area(share)


@pytest.mark.parametrize("target", [np.array([1, 2]), [np.int64(1), torch.tensor(2)], torch.tensor([1, 2])], ids=repr)
@pytest.mark.parametrize("explain", [class_activation, pixel_gradients])
def test_targets_may_be_numbers_of_other_packages(explain, target):
    assert torch.equal(explain(small_model(), images(), target), explain(small_model(), images(), [1, 2]))


@pytest.mark.parametrize("method", PIXEL_METHODS)
def test_an_image_is_explained_alike_alone_and_among_others(method):
    model, pixels = small_model(), images()
    pixels[0] *= 50
    among = pixel_gradients(model, pixels, [1, 2], method, steps=4)
    torch.testing.assert_close(among[1:], pixel_gradients(model, pixels[1:], 2, method, steps=4))


@pytest.mark.parametrize("explain", [class_activation, lambda *a: pixel_gradients(*a, "smoothgrad", steps=2)])
def test_explanations_in_threads_wait_for_each_other(explain):
    """One that starts in the middle of another neither trains nor takes its frozen parameters for the user's."""
    model = small_model(drop_path_rate=0.5, drop_rate=0.5).train()
    expected = explain(model, images(), 1)
    second: list[torch.Tensor] = []
    other = threading.Thread(target=lambda: second.append(explain(model, images(), 1)))
    reached = []

    def meanwhile(*_):
        if not other.ident:
            other.start()
            other.join(0.2)
            reached.append(other.is_alive())

    model.norm_f.register_forward_pre_hook(meanwhile)
    assert torch.equal(explain(model, images(), 1), expected)
    other.join()
    assert torch.equal(second[0], expected)
    assert reached == [True], "the second one waits"
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_an_index_error_of_the_model_is_not_swallowed(capsys):
    model = small_model()
    model.norm_f.register_forward_pre_hook(lambda *_: [][0])
    with pytest.raises(IndexError):
        class_activation(model, images(), 0)
    assert not capsys.readouterr().out


def test_grad_cam_that_cannot_be_imported(monkeypatch):
    """As without libGL, which opencv needs."""
    load = builtins.__import__

    def broken(name, *arguments, **keywords):
        if name == "pytorch_grad_cam":
            raise ImportError("libGL.so.1: cannot open shared object file")
        return load(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(ModuleNotFoundError, match=r"grad-cam, and it cannot be imported: libGL\.so\.1"):
        class_activation(small_model(), images(), 0)


def test_maps_of_padded_images_stand_where_the_patches_do():
    """Two pixels of the second row and column of patches are the image's, and fourteen padding."""
    model = small_model(dynamic_img_size=True, dynamic_img_pad=True, img_size=32, patch_size=16, cls_position="none")
    pixels = images(1, 32)
    whole = class_activation(model, pixels, 0, "eigencam")
    pixels[:, :, 18:] = 0
    pixels[:, :, :, 18:] = 0
    whole = class_activation(model, pixels, 0, "eigencam")
    cut = class_activation(model, pixels[:, :, :18, :18], 0, "eigencam")
    assert cut.shape == (1, 18, 18)
    torch.testing.assert_close(cut, whole[:, :18, :18])
    assert receptive_field(model, images(1, 40)[..., :33, :33]).center == (24, 24)
