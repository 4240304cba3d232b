"""Named models for `timm.create_model`, and the loading of their published weights."""

from __future__ import annotations

from functools import partial
from typing import Any, get_args

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._builder import resolve_pretrained_cfg
from timm.models._features import FeatureDictNet, FeatureHookNet
from timm.models._features_fx import FeatureGraphNet

from vim.layers.checks import check_kind
from vim.models.pretrained import (
    Resampling,
    Weights,
    checkpoint_filter_fn,
    find_weights,
    read_checkpoint,
    select_weights,
)
from vim.models.pyramid import VimPyramid
from vim.models.vision_mamba import VisionMamba


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2401.09417",
        "paper_name": "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
        "origin_url": "https://github.com/hustvl/Vim",
        **kwargs,
    }


_TINY = {"hf_hub_id": "hustvl/Vim-tiny-midclstok", "hf_hub_filename": "vim_t_midclstok_76p1acc.pth"}
_TINY_FT = {"hf_hub_id": "hustvl/Vim-tiny-midclstok", "hf_hub_filename": "vim_t_midclstok_ft_78p3acc.pth"}
_SMALL = {"hf_hub_id": "hustvl/Vim-small-midclstok", "hf_hub_filename": "vim_s_midclstok_80p5acc.pth"}
_SMALL_FT = {"hf_hub_id": "hustvl/Vim-small-midclstok", "hf_hub_filename": "vim_s_midclstok_ft_81p6acc.pth"}
_BASE = {"hf_hub_id": "hustvl/Vim-base-midclstok", "hf_hub_filename": "vim_b_midclstok_81p9acc.pth"}
_TINY_ROPE = {"hf_hub_id": "hustvl/Vim-tiny", "hf_hub_filename": "vim_tiny_73p1.pth"}

default_cfgs = generate_default_cfgs(
    {
        "vim_tiny_patch16_224.in1k": _cfg(**_TINY),
        "vim_tiny_patch16_stride8_224.in1k_ft": _cfg(**_TINY_FT),
        "vim_small_patch16_224.in1k": _cfg(**_SMALL),
        "vim_small_patch16_stride8_224.in1k_ft": _cfg(**_SMALL_FT),
        "vim_base_patch16_224.in1k": _cfg(**_BASE),
        "vim_tiny_pyramid_patch16_224.in1k": _cfg(**_TINY),
        "vim_small_pyramid_patch16_224.in1k": _cfg(**_SMALL),
        "vim_base_pyramid_patch16_224.in1k": _cfg(**_BASE),
        "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2.in1k": _cfg(**_TINY),
        "vim_tiny_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2.in1k_ft": _cfg(
            **_TINY_FT
        ),
        "vim_small_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2.in1k": _cfg(**_SMALL),
        "vim_small_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2.in1k_ft": _cfg(
            **_SMALL_FT
        ),
        "vim_base_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2.in1k": _cfg(**_BASE),
        "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_rope_also_residual_with_cls_token.in1k": _cfg(
            **_TINY_ROPE
        ),
    }
)


def _check_feature_cls(feature_cls: Any) -> None:
    """Raise for timm's feature extractors that do not call `forward_intermediates`.

    They return the outputs of modules, which are in scan order here and lack the residual.
    """
    others = (FeatureDictNet, FeatureHookNet, FeatureGraphNet)
    is_other = isinstance(feature_cls, type) and issubclass(feature_cls, others)
    if is_other or (isinstance(feature_cls, str) and feature_cls.lower() != "getter"):
        name = feature_cls if isinstance(feature_cls, str) else feature_cls.__name__
        raise ValueError(f"feature_cls must be 'getter' or a class such as vim.models.VimPyramid, got {name!r}")


def _create_vim(
    variant: str,
    pretrained: bool,
    size: dict[str, Any],
    pretrained_weights: Weights = "raw",
    pretrained_resampling: Resampling = "exact",
    feature_cfg: dict[str, Any] | None = None,
    **kwargs: Any,
) -> VisionMamba:
    """Build a variant; `pretrained_weights` and `pretrained_resampling` are arguments of `checkpoint_filter_fn`."""
    check_kind("pretrained_weights", pretrained_weights, get_args(Weights))
    check_kind("pretrained_resampling", pretrained_resampling, get_args(Resampling))
    _check_feature_cls(kwargs.get("feature_cls"))
    weights: Weights = pretrained_weights
    if pretrained:
        overlay = kwargs.get("pretrained_cfg_overlay") or {}
        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
        file = find_weights(cfg)
        if file is not None:
            state_dict = select_weights(read_checkpoint(file), weights)
            kwargs["pretrained_cfg_overlay"] = {**overlay, "state_dict": state_dict}
        if file is not None or cfg.source == "local-dir":
            weights = "raw"  # already selected; a local folder holds one plain state dict
    model = build_model_with_cfg(
        VisionMamba,
        variant,
        pretrained,
        pretrained_filter_fn=partial(checkpoint_filter_fn, weights=weights, resampling=pretrained_resampling),
        feature_cfg=dict(feature_cfg or {"out_indices": 3, "feature_cls": "getter"}),
        **{**size, **kwargs},
    )
    for module in model.modules():
        cfg_dict: Any = getattr(module, "pretrained_cfg", None)
        if isinstance(cfg_dict, dict):
            cfg_dict["state_dict"] = None  # else it stays in memory, and is copied with the model
    return model


_TINY_SIZE = {"embed_dim": 192, "depth": 24}
_SMALL_SIZE = {"embed_dim": 384, "depth": 24}
_BASE_SIZE = {"embed_dim": 768, "depth": 24}
_STRIDE8 = {"patch_stride": 8}


def _pyramid(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a variant whose features are a `VimPyramid`, for images of any size."""
    dynamic = {"dynamic_img_size": True} if kwargs.get("features_only") else {}
    return {"feature_cfg": {"out_indices": (0, 1, 2, 3), "feature_cls": VimPyramid}, **dynamic, **kwargs}


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti at 224 px: Zhu et al. 2024, Table 1; 76.1 % top-1."""
    return _create_vim("vim_tiny_patch16_224", pretrained, _TINY_SIZE, **kwargs)


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti with patches every 8 pixels, fine-tuned from `vim_tiny_patch16_224`; 78.3 % top-1."""
    return _create_vim("vim_tiny_patch16_stride8_224", pretrained, {**_TINY_SIZE, **_STRIDE8}, **kwargs)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S at 224 px: Zhu et al. 2024, Table 1; the released weights reach 80.5 % top-1."""
    return _create_vim("vim_small_patch16_224", pretrained, _SMALL_SIZE, **kwargs)


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S with patches every 8 pixels, fine-tuned from `vim_small_patch16_224`; 81.6 % top-1."""
    return _create_vim("vim_small_patch16_stride8_224", pretrained, {**_SMALL_SIZE, **_STRIDE8}, **kwargs)


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-B at 224 px: Zhu et al. 2024, Table 1; 81.9 % top-1."""
    return _create_vim("vim_base_patch16_224", pretrained, _BASE_SIZE, **kwargs)


@register_model
def vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2(
    pretrained: bool = False, **kwargs: Any
) -> VisionMamba:
    """`vim_tiny_patch16_224` under the original's name."""
    name = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
    return _create_vim(name, pretrained, _TINY_SIZE, **kwargs)


@register_model
def vim_tiny_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2(
    pretrained: bool = False, **kwargs: Any
) -> VisionMamba:
    """`vim_tiny_patch16_stride8_224` under the original's name."""
    name = "vim_tiny_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
    return _create_vim(name, pretrained, {**_TINY_SIZE, **_STRIDE8}, **kwargs)


@register_model
def vim_small_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2(
    pretrained: bool = False, **kwargs: Any
) -> VisionMamba:
    """`vim_small_patch16_224` under the original's name."""
    name = "vim_small_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
    return _create_vim(name, pretrained, _SMALL_SIZE, **kwargs)


@register_model
def vim_small_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2(
    pretrained: bool = False, **kwargs: Any
) -> VisionMamba:
    """`vim_small_patch16_stride8_224` under the original's name."""
    name = "vim_small_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
    return _create_vim(name, pretrained, {**_SMALL_SIZE, **_STRIDE8}, **kwargs)


@register_model
def vim_base_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2(
    pretrained: bool = False, **kwargs: Any
) -> VisionMamba:
    """`vim_base_patch16_224` under the original's name."""
    name = "vim_base_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2"
    return _create_vim(name, pretrained, _BASE_SIZE, **kwargs)


@register_model
def vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_rope_also_residual_with_cls_token(
    pretrained: bool = False, **kwargs: Any
) -> VisionMamba:
    """The first Vim-Ti, retired by its authors: class token first, rotary tables, summed directions; 73.1 % top-1."""
    name = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_rope_also_residual_with_cls_token"
    old = {"cls_position": "head", "rotary": "residual", "merge": "sum"}
    return _create_vim(name, pretrained, {**_TINY_SIZE, **old}, **kwargs)


@register_model
def vim_tiny_pyramid_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """`vim_tiny_patch16_224` whose `features_only` form is a `VimPyramid`, for images of any size."""
    return _create_vim("vim_tiny_pyramid_patch16_224", pretrained, _TINY_SIZE, **_pyramid(kwargs))


@register_model
def vim_small_pyramid_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """`vim_small_patch16_224` whose `features_only` form is a `VimPyramid`, for images of any size."""
    return _create_vim("vim_small_pyramid_patch16_224", pretrained, _SMALL_SIZE, **_pyramid(kwargs))


@register_model
def vim_base_pyramid_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """`vim_base_patch16_224` whose `features_only` form is a `VimPyramid`, for images of any size."""
    return _create_vim("vim_base_pyramid_patch16_224", pretrained, _BASE_SIZE, **_pyramid(kwargs))
