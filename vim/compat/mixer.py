"""mamba-ssm's `Mamba` and `Block`, on this library's mixer and norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vim import layers
from vim.checkpoints.upstream import translate_mixer_args
from vim.layers.traced import fx_leaf


class Mamba(layers.Mamba):
    """Mamba mixer with the arguments, the order of arguments and the state dict of mamba-ssm's.

    The arguments from `bimamba_type` on are of the fork that Vim's original brings.

    Args:
        d_model, d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_scale, dt_init_floor, conv_bias, bias: See
            `vim.Mamba`.
        dt_init: "random" or "constant".
        use_fast_path: Has no effect: there is one path.
        layer_idx: Key of this layer in the cache of `inference_params`.
        device, dtype: Of the parameters.
        bimamba_type: "none", "v1" or "v2".
        if_devide_out: Average the directions of a "v2" mixer instead of adding them.
        init_layer_scale: See `layer_scale` of `vim.Mamba`.
        others: Other spellings of these arguments in the history of the fork.

    Raises:
        TypeError: An argument is unknown.
        ValueError: A value is not supported; the message says which are.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: Any = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bimamba_type: str = "none",
        if_devide_out: bool = False,
        init_layer_scale: float | None = None,
        **others: Any,
    ) -> None:
        given: dict[str, Any] = {
            "d_model": d_model,
            "d_state": d_state,
            "d_conv": d_conv,
            "expand": expand,
            "dt_rank": dt_rank,
            "dt_min": dt_min,
            "dt_max": dt_max,
            "dt_init": dt_init,
            "dt_scale": dt_scale,
            "dt_init_floor": dt_init_floor,
            "conv_bias": conv_bias,
            "bias": bias,
            "device": device,
            "dtype": dtype,
            "bimamba_type": bimamba_type,
            "if_divide_out": others.pop("if_divide_out", if_devide_out),
            "init_layer_scale": init_layer_scale,
        }
        super().__init__(**translate_mixer_args(**given, **others))
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx

    @fx_leaf
    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        """Mix the tokens, (batch, len, d_model) -> (batch, len, d_model).

        Args:
            hidden_states: (batch, len, d_model); with `inference_params`, the tokens after those of earlier calls.
            inference_params: mamba-ssm's record of a generation, with `key_value_memory_dict` and `seqlen_offset`; the
                layer keeps its states in it. `None` runs without states.
        """
        if inference_params is None:
            return super().forward(hidden_states)
        states = self._states(inference_params, hidden_states.shape[0])
        if inference_params.seqlen_offset == 0:
            for state in states:
                state.zero_()
        return self.step(hidden_states, *states)[0]

    def _states(self, inference_params: Any, batch: int) -> tuple[Tensor, Tensor]:
        """Return the states of this layer, which the first call makes."""
        if self.layer_idx is None:
            raise ValueError("layer_idx must be given to the constructor for a call with inference_params")
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(batch, getattr(inference_params, "max_seqlen", 0))
        return cache[self.layer_idx]


class Block(nn.Module):
    """Residual addition, norm and mixer, then the same with an MLP if there is one.

    Args:
        dim: Width of the tokens.
        mixer_cls: Class or function that makes the mixer from `dim`.
        mlp_cls: Class or function that makes the MLP from `dim`; `nn.Identity` leaves it out.
        norm_cls: Class or function that makes a norm from `dim`.
        fused_add_norm: Has no effect on the result.
        residual_in_fp32: Keep the residual in float32.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Any,
        mlp_cls: Any = nn.Identity,
        norm_cls: Any = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        has_mlp = mlp_cls is not nn.Identity
        self.norm2: nn.Module | None = norm_cls(dim) if has_mlp else None
        self.mlp: nn.Module | None = mlp_cls(dim) if has_mlp else None

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, inference_params: Any = None, **mixer_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the output of the last part and the residual for the next block, (batch, len, dim) each."""
        hidden_states, residual = self._add_and_normalise(self.norm, hidden_states, residual)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = self._add_and_normalise(self.norm2, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def _add_and_normalise(self, norm: Any, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        total = total.float() if self.residual_in_fp32 else total
        return norm(total.to(norm.weight.dtype)), total

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: Any = None, **kwargs: Any) -> Any:
        """Return the states of the mixer at the start of a sequence."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)


class Block1(Block):
    """`Block` with the arguments of mamba-ssm 1, which has no MLP in a block."""

    def __init__(
        self,
        dim: int,
        mixer_cls: Any,
        norm_cls: Any = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__(dim, mixer_cls, nn.Identity, norm_cls, fused_add_norm, residual_in_fp32)
