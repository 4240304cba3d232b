"""Refusal of unknown arguments, with the names that the original's arguments have here."""

from __future__ import annotations

from collections.abc import Collection

# Arguments of hustvl/Vim and their names here; `None` has no counterpart.
ORIGINAL_NAMES: dict[str, str | None] = {
    "bimamba_type": "directions",
    "channels": "in_chans",
    "final_pool_type": "global_pool",
    "flip_img_sequences_ratio": "flip_ratio",
    "ft_seq_len": None,
    "fused_add_norm": None,
    "if_abs_pos_embed": "pos_embed",
    "if_bidirectional": "pairwise_layers",
    "if_bimamba": "directions",
    "if_cls_token": "cls_position",
    "if_devide_out": "merge",
    "if_divide_out": "merge",
    "if_random_cls_token_position": "cls_position",
    "if_random_token_rank": "token_shuffle",
    "if_rope": "rotary",
    "if_rope_residual": "rotary",
    "init_layer_scale": "layer_scale",
    "initializer_cfg": None,
    "layer_idx": None,
    "norm_epsilon": "norm_eps",
    "pt_hw_seq_len": "rotary_side",
    "residual_in_fp32": None,
    "rms_norm": "norm",
    "ssm_cfg": "d_conv, expand, dt_rank, conv_bias, bias",
    "stride": "patch_stride",
    "use_double_cls_token": "cls_position",
    "use_fast_path": None,
    "use_middle_cls_token": "cls_position",
}


def refuse_arguments(owner: str, names: Collection[str], translator: str) -> None:
    """Raise for arguments that `owner` does not take; name the counterparts of the original's arguments.

    Args:
        owner: Name of the class.
        names: Names of the unknown arguments.
        translator: Function of `vim.checkpoints.upstream` that translates the original's arguments.

    Raises:
        TypeError: `names` is not empty.
    """
    if not names:
        return
    listed = ", ".join(map(repr, names))
    message = f"{owner}() got an unexpected keyword argument {listed}"
    known = [name for name in names if name in ORIGINAL_NAMES]
    if known:
        here = "; ".join(f"{name} is {ORIGINAL_NAMES[name] or 'not needed'} here" for name in known)
        message += f": {here}; vim.checkpoints.upstream.{translator} translates the original's arguments"
    raise TypeError(message)
