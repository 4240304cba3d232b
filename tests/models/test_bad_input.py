"""Bad input: each kind gets an error in one line that names the argument and the value, and changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from timm.models._features_fx import FeatureGraphNet

import vim
from tests.models.small import small

NAME = "vim_tiny_patch16_224"
# Constructor arguments: value, what the error says.
ARGUMENTS = {
    "an unknown place of the class token": (
        {"cls_position": "end"},
        r"cls_position must be one of \['none', 'head', 'middle', 'double', 'random'\], got 'end'",
    ),
    "an unknown position embedding": ({"pos_embed": "sin"}, "pos_embed must be one of .*'sin'"),
    "unknown rotary tables": ({"rotary": "both"}, "rotary must be one of .*'both'"),
    "an unknown norm": ({"norm": "batch"}, "norm must be one of .*'batch'"),
    "unknown directions": ({"directions": "four"}, "directions must be .*'four'"),
    "an unknown merge": ({"merge": "max"}, "merge must be .*'max'"),
    "an unknown pooling": (
        {"global_pool": "max"},
        r"global_pool must be one of \['token', 'avg', ''\] with cls_position='middle', got 'max'",
    ),
    "a class token to pool that is not there": (
        {"cls_position": "none", "global_pool": "token"},
        r"global_pool must be one of \['avg', 'max', 'last', ''\] with cls_position='none', got 'token'",
    ),
    "negative classes": ({"num_classes": -1}, "num_classes must be an integer >= 0, got -1"),
    "fractional classes": ({"num_classes": 2.5}, r"num_classes must be an integer >= 0, got 2\.5"),
    "a flag for classes": ({"num_classes": True}, "num_classes must be an integer >= 0, got True"),
    "no blocks": ({"depth": 0}, "depth must be an integer >= 1, got 0"),
    "no width": ({"embed_dim": 0}, "embed_dim must be an integer >= 1, got 0"),
    "a fractional width": ({"embed_dim": 32.5}, r"embed_dim must be an integer >= 1, got 32\.5"),
    "no channels": ({"in_chans": 0}, "in_chans must be an integer >= 1, got 0"),
    "no state": ({"d_state": 0}, "d_state must be an integer >= 1, got 0"),
    "no taps": ({"d_conv": 0}, "d_conv must be an integer >= 1, got 0"),
    "no rank": ({"dt_rank": 0}, "dt_rank must be an integer >= 1, got 0"),
    "an expansion in words": ({"expand": "2"}, "expand must be a number >= 0.0, got '2'"),
    "a negative expansion": ({"expand": -1}, "expand must be a number >= 0.0, got -1"),
    "a layer scale in words": ({"layer_scale": "small"}, "layer_scale must be a number .*'small'"),
    "a negative epsilon": ({"norm_eps": -1e-5}, "norm_eps must be a number >= 0.0, got -1e-05"),
    "no side of the rotary grid": ({"rotary": "hidden", "rotary_side": 0}, "rotary_side must be an integer >= 1"),
    "a rate above one": ({"drop_path_rate": 1.5}, r"drop_path_rate must be a number between 0 and 1, got 1\.5"),
    "a negative rate": ({"flip_ratio": -1}, "flip_ratio must be a number between 0 and 1, got -1"),
    "a list of rates": ({"drop_rate": [0.1]}, r"drop_rate must be a number between 0 and 1, got \[0\.1\]"),
    "a patch larger than the image": (
        {"patch_size": 64},
        r"img_size must be at least patch_size = \(64, 64\), got \(32, 32\)",
    ),
    "no stride": ({"patch_stride": 0}, "patch_stride must be a positive integer.*0"),
    "a size in words": ({"img_size": "32"}, "img_size must be a positive integer or two of them, got '32'"),
    "three sizes": (
        {"img_size": (3, 32, 32)},
        r"img_size must be a positive integer or two of them, got \(3, 32, 32\)",
    ),
    "an integer dtype": ({"dtype": torch.int32}, "dtype must be a floating one of torch or None, got torch.int32"),
    "rotary tables with two class tokens": (
        {"rotary": "hidden", "cls_position": "double"},
        "rotary tables do not fit cls_position='double'",
    ),
    "rotary tables with an odd grid": (
        {"rotary": "hidden", "img_size": 24},
        r"even number of patches, got the grid \(3, 3\)",
    ),
    "rotary tables with an odd width": (
        {"rotary": "hidden", "embed_dim": 30},
        "multiple of 4 for rotary tables, got 30",
    ),
}


def image(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


# Calls on a model, which works as before when they have failed.
CALLS = {
    "an image of another size": (
        lambda m: m(image(1, 3, 32, 40)),
        r"x must be an image of img_size = \(32, 32\), got \(32, 40\); see set_input_size and dynamic_img_size",
    ),
    "other channels": (lambda m: m(image(1, 1, 32, 32)), r"with in_chans = 3, got \(1, 1, 32, 32\)"),
    "an image without a batch": (lambda m: m(image(3, 32, 32)), r"x must be \(batch, .* got \(3, 32, 32\)"),
    "bytes": (lambda m: m(image(1, 3, 32, 32).byte()), "x must be a tensor of normalised floating images.*torch.uint8"),
    "an array": (
        lambda m: m(np.zeros((1, 3, 32, 32))),
        "x must be a tensor of normalised floating images, got ndarray",
    ),
    "another dtype": (lambda m: m(image(1, 3, 32, 32).double()), "double.*float|Double.*Float"),
    "a block that is not there": (
        lambda m: m.forward_intermediates(image(1, 3, 32, 32), indices=[3]),
        r"indices must be a list of blocks, from -3 to 2, got \[3\]",
    ),
    "no block": (lambda m: m.forward_intermediates(image(1, 3, 32, 32), indices=[]), r"indices must be .* got \[\]"),
    "a block in words": (lambda m: m.prune_intermediate_layers("last"), "indices must be .* got 'last'"),
    "no last blocks": (lambda m: m.prune_intermediate_layers(0), "indices must be 1 to 3 last blocks .* got 0"),
    "an unknown format": (
        lambda m: m.forward_intermediates(image(1, 3, 32, 32), output_fmt="NHWC"),
        "output_fmt must be 'NCHW' or 'NLC', got 'NHWC'",
    ),
    "negative new classes": (lambda m: m.reset_classifier(-2), "num_classes must be an integer >= 0, got -2"),
    "an unknown new pooling": (lambda m: m.reset_classifier(3, "fast"), "global_pool must be one of .* got 'fast'"),
    "a new size below a patch": (lambda m: m.set_input_size(4), r"at least patch_size = \(8, 8\), got \(4, 4\)"),
    "a negative new size": (lambda m: m.set_input_size(-1), "img_size must be a positive integer .* got -1"),
    "a new patch above the size": (lambda m: m.set_input_size(patch_size=64), r"at least patch_size = \(64, 64\)"),
    "an unknown initialisation": (lambda m: m.init_weights("jax"), "mode must be '', got 'jax'"),
    "an order that is none": (
        lambda m: m.forward_features(image(1, 3, 32, 32), token_order=torch.zeros(17, dtype=torch.long)),
        r"token_order must be a permutation of 17 tokens, got a tensor of shape \(17,\)",
    ),
}

# What timm's factory is asked for.
NAMES = {
    "an unknown name": (lambda: timm.create_model(f"{NAME}_v9"), "Unknown model"),
    "an unknown tag": (lambda: timm.create_model(f"{NAME}.in22k"), "in22k"),
    "an unknown argument": (lambda: timm.create_model(NAME, img_sise=3), "img_sise"),
    "an argument of the original": (lambda: timm.create_model(NAME, if_cls_token=True), "if_cls_token"),
    "an argument of a ViT": (lambda: timm.create_model(NAME, qkv_bias=True), "qkv_bias"),
    "unknown weights": (
        lambda: timm.create_model(NAME, pretrained=True, pretrained_weights="best"),
        r"pretrained_weights must be one of \['raw', 'ema'\], got 'best'",
    ),
    "an unknown resampling": (
        lambda: timm.create_model(NAME, pretrained=True, pretrained_resampling="nearest"),
        r"pretrained_resampling must be one of \['exact', 'reference'\], got 'nearest'",
    ),
    "features of a block that is not there": (
        lambda: timm.create_model(NAME, depth=2, img_size=32, features_only=True, out_indices=(2,)),
        r"indices must be a list of blocks, from -2 to 1, got \(2,\)",
    ),
    "features by hooks, which see the order of the scan": (
        lambda: timm.create_model(NAME, depth=2, features_only=True, feature_cls="hook"),
        "feature_cls must be 'getter' or a class such as vim.models.VimPyramid, got 'hook'",
    ),
    "features of a traced graph": (
        lambda: timm.create_model(NAME, depth=2, features_only=True, feature_cls=FeatureGraphNet),
        "feature_cls must be .* got 'FeatureGraphNet'",
    ),
}


@pytest.mark.parametrize("kind", list(ARGUMENTS))
def test_arguments(kind):
    kwargs, message = ARGUMENTS[kind]
    with pytest.raises(ValueError, match=message) as caught:
        small(**kwargs)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def model() -> vim.VisionMamba:
    return small().eval()


@pytest.mark.parametrize("kind", list(CALLS))
def test_calls(kind, model):
    call, message = CALLS[kind]
    before = {name: (t, t._version) for name, t in model.state_dict(keep_vars=True).items()}
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message) as caught:
        call(model)
    assert "\n" not in str(caught.value)
    assert {name: (t, t._version) for name, t in model.state_dict(keep_vars=True).items()} == before
    assert model(image(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("kind", list(NAMES))
def test_names(kind):
    call, message = NAMES[kind]
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        call()


def test_a_place_of_the_class_token_that_is_not_there():
    model = small(cls_position="random")
    with pytest.raises(ValueError, match="cls_index must be from 0 to 16, got 17"):
        model.forward_features(image(1, 3, 32, 32), cls_index=17)


@pytest.mark.parametrize("size", [(4, 32), (32, 7)])
def test_an_image_below_a_patch(size):
    with pytest.raises(ValueError, match=rf"at least patch_size = \(8, 8\), got \({size[0]}, {size[1]}\)"):
        small(dynamic_img_size=True)(image(1, 3, *size))
    assert small(dynamic_img_size=True, dynamic_img_pad=True)(image(1, 3, *size)).shape == (1, 10)


def test_a_size_that_rotary_tables_refuse_changes_nothing():
    model = small(rotary="hidden")
    with pytest.raises(ValueError, match=r"even number of patches, got the grid \(3, 3\)"):
        model.set_input_size(24)
    assert model(image(1, 3, 32, 32)).shape == (1, 10)


# What ours say, and PyTorch's own layers.
FREED = r"needs .* bytes of memory|not allocated yet|out of bounds for storage"


@pytest.mark.parametrize(
    "settings",
    [{}, {"layer_scale": 1.0}, {"directions": "v1", "bias": True}, {"directions": "none", "norm": "layer"}],
    ids=["plain", "layer scale", "v1", "forward only"],
)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_a_parameter_whose_memory_was_freed(settings, grad):
    """As sharding and offloading do. Without checks the process ends."""
    model, images = small(depth=1, **settings).eval(), torch.randn(1, 3, 32, 32)
    with torch.set_grad_enabled(grad):
        expected = model(images)
        for name, p in model.named_parameters():
            values, memory, last = p.detach().clone(), p.untyped_storage(), name.rpartition(".")[2]
            memory.resize_(0)
            with pytest.raises(RuntimeError, match=f"{last} needs" if last in ("pos_embed", "gamma") else FREED):
                model(images)
            memory.resize_(values.nbytes)
            p.data.copy_(values)
            assert torch.equal(model(images), expected), name
