"""Translation of the original's constructor arguments into arguments of this library.

The facts are of hustvl/Vim at dd0358a. Unknown names raise here; the original ignores some of them.
`vim.layers.arguments` has the names alone, for error messages.
"""

from __future__ import annotations

from typing import Any

# Defaults of the original, on which its registered models and checkpoints rely.
MODEL_DEFAULTS: dict[str, Any] = {
    "img_size": 224,
    "patch_size": 16,
    "stride": 16,
    "depth": 24,
    "embed_dim": 192,
    "d_state": 16,
    "channels": 3,
    "num_classes": 1000,
    "ssm_cfg": None,
    "drop_rate": 0.0,
    "drop_path_rate": 0.1,
    "norm_epsilon": 1e-5,
    "rms_norm": True,
    "initializer_cfg": None,
    "fused_add_norm": True,
    "residual_in_fp32": True,
    "device": None,
    "dtype": None,
    "ft_seq_len": None,
    "pt_hw_seq_len": 14,
    "if_bidirectional": False,
    "final_pool_type": "none",
    "if_abs_pos_embed": True,
    "if_rope": False,
    "if_rope_residual": False,
    "flip_img_sequences_ratio": -1.0,
    "if_bimamba": False,
    "bimamba_type": "v2",
    "if_cls_token": True,
    "if_divide_out": True,
    "init_layer_scale": None,
    "use_double_cls_token": False,
    "use_middle_cls_token": True,
    # Arguments of the original's forward call; here they are properties of the model.
    "if_random_cls_token_position": False,
    "if_random_token_rank": False,
}
MIXER_DEFAULTS: dict[str, Any] = {
    "d_state": 16,
    "d_conv": 4,
    "expand": 2,
    "dt_rank": "auto",
    "dt_min": 0.001,
    "dt_max": 0.1,
    "dt_init": "random",
    "dt_scale": 1.0,
    "dt_init_floor": 1e-4,
    "conv_bias": True,
    "bias": False,
    "use_fast_path": True,
    "layer_idx": None,
    "device": None,
    "dtype": None,
    "bimamba_type": "none",
    "if_divide_out": False,
    "init_layer_scale": None,
}
# Other spellings of an argument in the history of the original.
SYNONYMS = {"if_devide_out": "if_divide_out", "in_chans": "channels"}
# Of the original's initialisation. No module of Vim reads `initializer_range`, which is for embeddings of words.
INITIALIZER_DEFAULTS = {"initializer_range": 0.02, "rescale_prenorm_residual": True, "n_residuals_per_layer": 1}
_STEP_SIZE = ("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor")
_POOLS = {"none": "last", "mean": "avg", "max": "max", "all": ""}


def translate_mixer_args(**upstream: Any) -> dict[str, Any]:
    """Translate arguments of the original's mixer into arguments of `vim.Mamba`.

    Missing arguments take the original's defaults ("none" for the directions). `d_model` is passed through.
    `use_fast_path` and `layer_idx` have no counterpart and are ignored.

    Raises:
        TypeError: The original does not have an argument.
        ValueError: The original does not allow a value.
    """
    passed = {name: upstream.pop(name) for name in ("d_model",) if name in upstream}
    args = _with_defaults("mixer", MIXER_DEFAULTS, upstream)
    same = ("d_state", "d_conv", "expand", "dt_rank", "conv_bias", "bias", "device", "dtype")
    return {
        **passed,
        **{name: args[name] for name in (*same, *_STEP_SIZE)},
        "directions": _directions(args["bimamba_type"]),
        "merge": _merge(args["bimamba_type"], args["if_divide_out"]),
        "layer_scale": args["init_layer_scale"],
    }


def translate_model_args(**upstream: Any) -> dict[str, Any]:
    """Translate arguments of the original's model into arguments of `vim.VisionMamba`.

    Missing arguments take the original's defaults. `fused_add_norm` and `residual_in_fp32` do not change the result and
    are ignored. `if_random_cls_token_position` and `if_random_token_rank`, arguments of the original's forward call,
    are accepted too.

    Raises:
        TypeError: The original does not have an argument.
        ValueError: The original does not allow a value, or fails with a combination: maximum pooling with a class
            token, or rotary tables whose side differs from the grid's.
    """
    args = _with_defaults("model", MODEL_DEFAULTS, upstream)
    _check_initializer(args["initializer_cfg"])
    bimamba_type = "v1" if args["if_bimamba"] else args["bimamba_type"]
    same = (
        "img_size",
        "patch_size",
        "depth",
        "embed_dim",
        "d_state",
        "num_classes",
        "drop_path_rate",
        "device",
        "dtype",
    )
    translated = {
        **{name: args[name] for name in same},
        "img_size": _as_pair_or_side(args["img_size"]),
        "patch_stride": args["stride"],
        "in_chans": args["channels"],
        "pos_drop_rate": args["drop_rate"],
        "norm": "rms" if args["rms_norm"] else "layer",
        "norm_eps": args["norm_epsilon"],
        "pairwise_layers": args["if_bidirectional"],
        "global_pool": _pool(args["final_pool_type"], args["if_cls_token"]),
        "pos_embed": "learn" if args["if_abs_pos_embed"] else "none",
        "rotary": ("residual" if args["if_rope_residual"] else "hidden") if args["if_rope"] else "none",
        "rotary_side": args["pt_hw_seq_len"],
        "flip_ratio": min(max(args["flip_img_sequences_ratio"], 0.0), 1.0),
        "token_shuffle": args["if_random_token_rank"],
        "cls_position": _cls_position(args),
        "directions": _directions(bimamba_type),
        "merge": _merge(bimamba_type, args["if_divide_out"]),
        "layer_scale": args["init_layer_scale"],
        **_ssm_cfg(args["ssm_cfg"]),
    }
    _check_rotary_side(args)
    return translated


def _with_defaults(kind: str, defaults: dict[str, Any], upstream: dict[str, Any]) -> dict[str, Any]:
    renamed = {SYNONYMS.get(name, name): value for name, value in upstream.items()}
    if len(renamed) < len(upstream):
        raise TypeError(f"two spellings of one argument are given: {sorted(upstream)}")
    unknown = sorted(set(renamed) - set(defaults))
    if unknown:
        raise TypeError(f"the original's {kind} has no argument {', '.join(map(repr, unknown))}")
    return {**defaults, **renamed}


def _directions(bimamba_type: str) -> str:
    if bimamba_type not in ("none", "v1", "v2"):
        raise ValueError(f"bimamba_type must be 'none', 'v1' or 'v2', got {bimamba_type!r}")
    return bimamba_type


def _merge(bimamba_type: str, if_divide_out: bool) -> str:
    # The original never averages the directions of a "v1" mixer, even with if_divide_out=True.
    return "mean" if if_divide_out and bimamba_type == "v2" else "sum"


def _pool(final_pool_type: str, if_cls_token: bool) -> str:
    if final_pool_type not in _POOLS:
        raise ValueError(f"final_pool_type must be one of {sorted(_POOLS)}, got {final_pool_type!r}")
    if not if_cls_token:
        return _POOLS[final_pool_type]
    if final_pool_type == "max":
        raise ValueError(
            "final_pool_type='max' with if_cls_token=True is refused: the original takes the maximum over classes"
        )
    return "token"


def _cls_position(args: dict[str, Any]) -> str:
    if not args["if_cls_token"]:
        return "none"
    if args["use_double_cls_token"]:
        return "double"
    if args["use_middle_cls_token"]:
        return "middle"
    return "random" if args["if_random_cls_token_position"] else "head"


def _ssm_cfg(ssm_cfg: dict[str, Any] | None) -> dict[str, Any]:
    """Translate the arguments of all mixers; those that `vim.VisionMamba` lacks must have their defaults."""
    supported = ("d_conv", "expand", "dt_rank", "conv_bias", "bias")
    translated = {}
    for name, value in (ssm_cfg or {}).items():
        if name not in MIXER_DEFAULTS:
            raise TypeError(f"the original's mixer has no argument {name!r} (in ssm_cfg)")
        if name in supported:
            translated[name] = value
        elif name in _STEP_SIZE and value != MIXER_DEFAULTS[name]:
            raise ValueError(
                f"ssm_cfg[{name!r}] changes initial weights only and is not an argument of a model: set `{name}` of "
                f"the mixer of each block in `model.layers` to {value!r}, then call `model.init_weights()`"
            )
        elif name not in ("use_fast_path", "layer_idx") and value != MIXER_DEFAULTS[name]:
            raise ValueError(f"ssm_cfg[{name!r}] must be {MIXER_DEFAULTS[name]!r} in a model, got {value!r}")
    return translated


def _check_initializer(initializer_cfg: dict[str, Any] | None) -> None:
    """Raise for initial weights that `VisionMamba.init_weights` does not draw."""
    for name, value in (initializer_cfg or {}).items():
        if name not in INITIALIZER_DEFAULTS:
            raise TypeError(f"the original's initialisation has no argument {name!r} (in initializer_cfg)")
        if name != "initializer_range" and value != INITIALIZER_DEFAULTS[name]:
            raise ValueError(
                f"initializer_cfg[{name!r}] must be {INITIALIZER_DEFAULTS[name]!r}, got {value!r}: scale the weight of "
                f"`out_proj` of the mixers in `model.layers` after the model is built"
            )


def _check_rotary_side(args: dict[str, Any]) -> None:
    """Raise unless `ft_seq_len`, the side of the original's rotary tables, is the side of the grid."""
    if not args["if_rope"] or args["ft_seq_len"] is None:
        return
    height, width = ((args["img_size"],) * 2) if isinstance(args["img_size"], int) else args["img_size"]
    sides = {(side - args["patch_size"]) // args["stride"] + 1 for side in (height, width)}
    if sides != {args["ft_seq_len"]}:
        raise ValueError(f"ft_seq_len must be the side of the grid, {sorted(sides)}, got {args['ft_seq_len']}")


def _as_pair_or_side(img_size: Any) -> Any:
    return tuple(img_size) if isinstance(img_size, list) else img_size
