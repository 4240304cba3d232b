"""Vision Mamba (Zhu et al. 2024, arXiv:2401.09417): the model, without its named variants."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal, NoReturn

import torch
from timm.layers import calculate_drop_path_rates
from timm.models import checkpoint, register_notrace_module
from timm.models._input import update_model_args, update_model_input_size
from torch import Tensor, nn
from torch.fx import Proxy

from vim.layers import AddResidual, Block, GridRotary, LayerNorm, Mamba, PatchEmbed, RMSNorm
from vim.layers.arguments import refuse_arguments
from vim.layers.checks import check_counts, check_dtype, check_kind, check_numbers, check_rates
from vim.layers.head import classify
from vim.layers.init import init_head, init_patch_embed, init_token
from vim.layers.mixer import Directions, Merge
from vim.layers.patch_embed import Size
from vim.layers.pos_embed import CLS_POSITIONS, cls_indices, resample_pos_embed
from vim.layers.token_sequence import TokenSequence, class_tokens_first, extract_tokens
from vim.models.checks import check_blocks, check_order
from vim.models.state_dicts import under_own_names

ClsPosition = Literal["none", "head", "middle", "double", "random"]
GlobalPool = Literal["token", "avg", "max", "last", ""]
Tap = Literal["sum", "mixer"]
_NORMS: dict[str, type[nn.Module]] = {"rms": RMSNorm, "layer": LayerNorm}

# torch.fx cannot trace the branches in these modules, so each is one node of a graph.
for _leaf in (Mamba, PatchEmbed, GridRotary, *_NORMS.values(), AddResidual):
    register_notrace_module(_leaf)


class VisionMamba(nn.Module):
    """Vision Mamba: patches and a class token, `depth` bidirectional Mamba blocks, a norm and a linear head.

    Args:
        img_size: (height, width) or a side, in pixels.
        patch_size: Likewise; the extent of a patch.
        patch_stride: Likewise; the step between patches. `None` is the patch size.
        in_chans: Channels of the image.
        num_classes: Outputs of the head; with 0 there is no head and the model returns features.
        global_pool: Input of the head: "token" (the class token, or the mean of both with "double"), "avg" (the mean
            over patches), "last" (the last token), "max" (the maximum over tokens of each class's logit), "" (every
            token). "last" and "max" need a model without a class token. `None` is "token", or "avg" without one.
        embed_dim: Width of the tokens.
        depth: Number of blocks.
        d_state, d_conv, expand, dt_rank, conv_bias, bias, directions, merge, layer_scale: See `vim.Mamba`.
        cls_position: Position of the class token: "none", "head", "middle", "double" (a token at each end) or
            "random" (drawn in each call).
        pos_embed: "learn" (a vector per token, class token included) or "none".
        rotary: Rotary tables before each block: "none", "hidden" (rotate the hidden state) or "residual" (rotate the
            hidden state and the residual).
        rotary_side: Side of the grid on which the rotary frequencies are defined.
        pairwise_layers: Blocks 2i and 2i + 1 read the same input, the second one reversed, and their outputs are
            added. A last block without a partner is not used.
        flip_ratio: Probability that a call reverses the sequences, after the position embedding. The class token is
            still read at its position before the reversal, as in the original.
        token_shuffle: Shuffle the tokens in each call; the class token is read at its new position.
        norm: "rms" or "layer".
        norm_eps: Added to the mean square or the variance.
        drop_rate: Dropout before the head.
        pos_drop_rate: Dropout after the position embedding.
        drop_path_rate: Stochastic depth at the last block, rising linearly from 0.
        dynamic_img_size: Accept images of any size, and resample the position embedding in each call.
        dynamic_img_pad: Pad images until patches cover them.
        device, dtype: Of the parameters.

    Attributes:
        tokens: Identity module that `forward_features` calls with its result, for hooks.

    Shape:
        (batch, in_chans, height, width) -> (batch, num_classes).

    Raises:
        TypeError: An argument is unknown.
        ValueError: An argument has a wrong value, or two arguments exclude each other; the message names them.

    Source: Zhu et al. 2024, arXiv:2401.09417, section 3; Tables 4 and 5 compare `directions` and `cls_position`.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        patch_stride: Size | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: GlobalPool | None = None,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        conv_bias: bool = True,
        bias: bool = False,
        directions: Directions = "v2",
        merge: Merge = "mean",
        layer_scale: float | None = None,
        cls_position: ClsPosition = "middle",
        pos_embed: Literal["learn", "none"] = "learn",
        rotary: Literal["none", "hidden", "residual"] = "none",
        rotary_side: int = 14,
        pairwise_layers: bool = False,
        flip_ratio: float = 0.0,
        token_shuffle: bool = False,
        norm: Literal["rms", "layer"] = "rms",
        norm_eps: float = 1e-5,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown: NoReturn,
    ) -> None:
        super().__init__()
        refuse_arguments("VisionMamba", unknown, "translate_model_args")
        check_kind("cls_position", cls_position, CLS_POSITIONS)
        check_kind("pos_embed", pos_embed, ("learn", "none"))
        check_kind("rotary", rotary, ("none", "hidden", "residual"))
        check_kind("norm", norm, tuple(_NORMS))
        check_rates(
            flip_ratio=flip_ratio, drop_rate=drop_rate, pos_drop_rate=pos_drop_rate, drop_path_rate=drop_path_rate
        )
        check_counts(0, num_classes=num_classes)
        check_counts(1, depth=depth, embed_dim=embed_dim, rotary_side=rotary_side)
        check_numbers(0.0, expand=expand, norm_eps=norm_eps)
        check_numbers(-math.inf, layer_scale=0.0 if layer_scale is None else layer_scale)
        check_dtype(dtype)
        if rotary != "none" and cls_position == "double":
            raise ValueError("rotary tables do not fit cls_position='double': the tokens at both ends have no cell")
        self.cls_position, self.rotary = cls_position, rotary
        self.global_pool = self._check_pool(global_pool)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.depth = depth
        self.num_prefix_tokens = len(cls_indices(cls_position, 0))
        self.pairwise_layers = pairwise_layers
        self.flip_ratio, self.token_shuffle = flip_ratio, token_shuffle
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}

        # Registered in the order of the released state dicts: optimizer states refer to parameters by index.
        for name in self._cls_names():
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, embed_dim, **factory_kwargs)))
        self.patch_embed = PatchEmbed(
            img_size,
            patch_size,
            patch_stride,
            in_chans,
            embed_dim,
            strict_img_size=not dynamic_img_size,
            dynamic_img_pad=dynamic_img_pad,
            **factory_kwargs,
        )
        tokens = self.patch_embed.num_patches + self.num_prefix_tokens
        self.pos_embed = (
            nn.Parameter(torch.empty(1, tokens, embed_dim, **factory_kwargs)) if pos_embed == "learn" else None
        )
        self.pos_drop = nn.Dropout(pos_drop_rate)
        if rotary != "none":
            self.rope = GridRotary(embed_dim, self.patch_embed.grid_size, rotary_side, **factory_kwargs)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._make_head(num_classes, factory_kwargs)
        self.drop_path = Block.make_drop_path(drop_path_rate)
        # A block drops the output of the previous block: the first two never do, and the final norm drops the last.
        rates = [0.0, *calculate_drop_path_rates(drop_path_rate, depth)]
        self.layers = nn.ModuleList(
            Block(
                Mamba(
                    embed_dim,
                    d_state=d_state,
                    d_conv=d_conv,
                    expand=expand,
                    dt_rank=dt_rank,
                    conv_bias=conv_bias,
                    bias=bias,
                    directions=directions,
                    merge=merge,
                    layer_scale=layer_scale,
                    **factory_kwargs,
                ),
                _NORMS[norm](embed_dim, eps=norm_eps, **factory_kwargs),
                drop_path=rates[i],
            )
            for i in range(depth)
        )
        self.norm_f = _NORMS[norm](embed_dim, eps=norm_eps, **factory_kwargs)
        self.tokens = nn.Identity()  # for hooks
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]
        self.init_weights(needs_reset=False)

    def _cls_names(self) -> list[str]:
        if self.cls_position == "double":
            return ["cls_token_head", "cls_token_tail"]
        return [] if self.cls_position == "none" else ["cls_token"]

    def _make_head(self, num_classes: int, factory_kwargs: dict[str, Any]) -> nn.Module:
        return nn.Linear(self.embed_dim, num_classes, **factory_kwargs) if num_classes > 0 else nn.Identity()

    def _check_pool(self, global_pool: str | None) -> str:
        has_token = self.cls_position != "none"
        if global_pool is None:
            return "token" if has_token else "avg"
        allowed = ("token", "avg", "") if has_token else ("avg", "max", "last", "")
        check_kind("global_pool", global_pool, allowed, f" with cls_position={self.cls_position!r}")
        return global_pool

    @torch.no_grad()
    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Draw all parameters and compute all tables, as in the original.

        Args:
            mode: Must be ""; it exists for timm's signature.
            needs_reset: Also reset the modules that initialise themselves when built. Needed after `to_empty`.

        Raises:
            ValueError: `mode` is not "".
        """
        if mode:
            raise ValueError(f"mode must be '', got {mode!r}")
        if needs_reset:
            for module in self.modules():
                if isinstance(module, Mamba):
                    module.reset_parameters()
                elif isinstance(module, GridRotary):
                    module.init_tables()
                elif isinstance(module, (RMSNorm, LayerNorm)):
                    module.reset_parameters()
        init_patch_embed(self.patch_embed.proj)
        init_head(self.head)
        for name in self._cls_names():
            init_token(self.get_parameter(name))
        if self.pos_embed is not None:
            init_token(self.pos_embed)
        for module in self.modules():
            if isinstance(module, Mamba):
                module.init_in_model(self.depth)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters that the original excludes from weight decay, besides one-dimensional ones."""
        own = {name for name, _ in self.named_parameters(recurse=False)}
        return own & {"pos_embed", "cls_token", "cls_token_head", "cls_token_tail"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return patterns that assign parameters to layers, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed|^rope",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: GlobalPool | None = None) -> None:
        """Replace the head by one with `num_classes` outputs (0: none); change the pooling unless it is `None`."""
        check_counts(0, num_classes=num_classes)
        if global_pool is not None:
            self.global_pool = self._check_pool(global_pool)
            update_model_args(self, global_pool=global_pool)
        self.num_classes = num_classes
        weight = self.patch_embed.proj.weight
        self.head = self._make_head(num_classes, {"device": weight.device, "dtype": weight.dtype})
        init_head(self.head)
        self.head.train(self.training)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copy weights into the model, from a state dict or a checkpoint that holds one (`vim.models.state_dicts`)."""
        if not state_dict.keys() <= self.state_dict().keys():
            state_dict = under_own_names(state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    @torch.no_grad()
    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Change the image and patch size; resample position embedding, rotary tables and filters."""
        embed, old_grid = self.patch_embed, self.patch_embed.grid_size
        *_, new_grid = embed.resized(img_size, patch_size)
        if self.rotary != "none" and new_grid != old_grid:  # first, since it may raise
            table = self.rope.freqs_cos
            self.rope = GridRotary(
                self.embed_dim, new_grid, self.rope.pretrained_side, device=table.device, dtype=table.dtype
            )
        embed.set_input_size(img_size, patch_size)
        update_model_input_size(self, embed.img_size, patch_size=embed.patch_size, patch_stride=embed.stride)
        if self.pos_embed is not None and new_grid != old_grid:
            resampled = resample_pos_embed(self.pos_embed, old_grid, new_grid, self.cls_position)
            self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)

    def _embed(self, x: Tensor, cls_index: int | None, token_order: Tensor | None) -> tuple[Tensor, TokenSequence]:
        """Return the tokens in scan order, (batch, len, embed_dim), and the record of that order."""
        if isinstance(x, Proxy):
            self._check_traced()
        grid = self.patch_embed.grid_size
        if self.dynamic_img_size:
            grid = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        num_patches = grid[0] * grid[1]
        places = cls_indices(self.cls_position, num_patches)
        if self.cls_position == "random":
            places = (int(torch.randint(num_patches + 1, ())) if cls_index is None else cls_index,)
            check_kind("cls_index", places[0], range(num_patches + 1))
        pos_embed: Tensor | None = self.pos_embed
        if pos_embed is not None:
            pos_embed = resample_pos_embed(pos_embed, self.patch_embed.grid_size, grid, self.cls_position)
        tokens = [getattr(self, name) for name in self._cls_names()]
        x = self.pos_drop(self.patch_embed.embed(x, tokens, places, pos_embed))
        order = token_order
        if self.token_shuffle and order is None:
            order = torch.randperm(x.shape[1], device=x.device)
        if order is not None:
            check_order("token_order", order, x.shape[1])
            x = x[:, order]
        flipped = self.flip_ratio > 0 and (self.flip_ratio == 1 or float(torch.rand(())) < self.flip_ratio)
        return x.flip(1) if flipped else x, TokenSequence(grid, places, order, flipped)

    def _check_traced(self) -> None:
        """Raise if calls differ in sizes or random draws, which a graph of torch.fx would hold as constants."""
        differs = {
            "cls_position": self.cls_position == "random",
            "token_shuffle": self.token_shuffle,
            "flip_ratio": 0 < self.flip_ratio < 1,
            "dynamic_img_size": self.dynamic_img_size,
        }
        for name in (name for name, is_on in differs.items() if is_on):
            raise TypeError(
                f"torch.fx cannot trace a model with {name}={getattr(self, name)!r}: use forward_intermediates, or "
                "torch.export for images of any size"
            )

    def _rotate(self, tokens: Tensor, flipped: bool, tables: tuple[Tensor, Tensor]) -> Tensor:
        return self.rope(tokens.flip(1), tables).flip(1) if flipped else self.rope(tokens, tables)

    def _run_layers(
        self, x: Tensor, sequence: TokenSequence, depth: int, take: Collection[int] = (), start: int = 0
    ) -> tuple[Tensor, Tensor | None, list[tuple[Tensor, Tensor]]]:
        """Run the first `depth` blocks.

        Returns:
            Hidden state and residual, (batch, len, embed_dim) each, and both after each block in `take`.
        """
        residual: Tensor | None = None
        taken: list[tuple[Tensor, Tensor]] = []
        step = 2 if self.pairwise_layers else 1
        tables = None if self.rotary == "none" else self.rope.tables(sequence.grid)
        for i in range(start, depth - depth % step, step):
            if tables is not None:
                x = self._rotate(x, sequence.flipped, tables)
                if residual is not None and self.rotary == "residual":
                    residual = self._rotate(residual, sequence.flipped, tables)
            if self.pairwise_layers:
                reversed_residual = None if residual is None else residual.flip(1)
                x_b, residual_b = self._run_layer(i + 1, x.flip(1), reversed_residual)
                x, residual = self._run_layer(i, x, residual)
                x, residual = x + x_b.flip(1), residual + residual_b.flip(1)
            else:
                x, residual = self._run_layer(i, x, residual)
            taken += [(x, residual) for index in range(i, i + step) if index in take]
        return x, residual, taken

    def _run_layer(self, i: int, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.layers[i], x, residual)
        return self.layers[i](x, residual)

    def forward_features(self, x: Tensor, cls_index: int | None = None, token_order: Tensor | None = None) -> Tensor:
        """Return the tokens after the final norm, class tokens first: (batch, class tokens + patches, embed_dim).

        Args:
            x: Images, (batch, in_chans, height, width).
            cls_index: Position of the class token with cls_position="random"; drawn if `None`.
            token_order: Permutation of the tokens, (len,); drawn if `None` and `token_shuffle` is on.
        """
        x, sequence = self._embed(x, cls_index, token_order)
        x, residual, _ = self._run_layers(x, sequence, self.depth)
        x, _ = self.norm_f(self.drop_path(x), residual)
        return self.tokens(class_tokens_first(x, sequence.read_out()))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        tap: Tap = "sum",
    ) -> Any:
        """Return the outputs of blocks (residual plus hidden state), as maps or as tokens; timm's interface.

        Patches are in row-major order, independent of the scan order.

        Args:
            x: Images, (batch, in_chans, height, width).
            indices: The last n blocks, a list of blocks, or `None` for all.
            return_prefix_tokens: Also return the class tokens of each block.
            norm: Apply the final norm to each output.
            stop_early: Stop after the last block in `indices`.
            output_fmt: "NCHW", (batch, embed_dim, rows, columns), or "NLC", (batch, patches, embed_dim).
            intermediates_only: Return the intermediates without the final features.
            output_dict: Return a dictionary with timm's keys.
            tap: "sum" (residual plus hidden state) or "mixer" (the mixer's output alone, as the original's
                segmentation with Vim-Ti).

        Returns:
            (features as in `forward_features`, intermediates), the intermediates alone, or a dictionary.

        Raises:
            ValueError: `output_fmt` or `tap` is neither, the final norm is asked of the mixer's output, or `indices`
                names a block that does not exist.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        check_kind("tap", tap, ("sum", "mixer"))
        if norm and tap == "mixer":
            raise ValueError("norm must be False with tap='mixer': the final norm is of residual plus hidden state")
        take, last = check_blocks(indices, self.depth)
        x, sequence = self._embed(x, None, None)
        step = 2 if self.pairwise_layers else 1
        depth = min(-(-(last + 1) // step) * step, self.depth) if stop_early else self.depth
        x, residual, taken = self._run_layers(x, sequence, depth, take)
        prefixes, maps = [], []
        for hidden, total in taken:
            if norm:
                taken_out = self.norm_f(hidden, total)[0]
            else:
                taken_out = hidden if tap == "mixer" else (total + hidden).to(hidden.dtype)
            tokens, patches = extract_tokens(sequence.undo(taken_out), sequence.places)
            prefixes.append(torch.cat(tokens, 1) if tokens else patches[:, :0])
            maps.append(patches.mT.unflatten(2, sequence.grid).contiguous() if output_fmt == "NCHW" else patches)
        result: dict[str, Any] = {"image_intermediates": maps}
        if return_prefix_tokens and self.num_prefix_tokens:
            result["image_intermediates_prefix"] = prefixes
        if not intermediates_only:
            final, _ = self.norm_f(self.drop_path(x), residual)
            result["image_features"] = self.tokens(class_tokens_first(final, sequence.read_out()))
        if output_dict:
            return result
        pairs = return_prefix_tokens and self.num_prefix_tokens
        intermediates = list(zip(maps, prefixes, strict=True)) if pairs else maps
        return intermediates if intermediates_only else (result["image_features"], intermediates)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | list[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """Return the outputs of the last `n` blocks, or of a list of blocks, through DINO's interface.

        Args:
            x: Images, (batch, in_chans, height, width).
            n: The last n blocks, or a list of blocks.
            reshape: Return maps, (batch, embed_dim, rows, columns), instead of tokens, (batch, patches, embed_dim).
            return_prefix_tokens: Also return the class tokens of each block.
            norm: Apply the final norm to each output.
        """
        return self.forward_intermediates(
            x, n, return_prefix_tokens, norm, output_fmt="NCHW" if reshape else "NLC", intermediates_only=True
        )

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the modules that the selected blocks do not need, and return the indices of these blocks."""
        take, last = check_blocks(indices, self.depth)
        step = 2 if self.pairwise_layers else 1
        self.depth = min(-(-(last + 1) // step) * step, self.depth)
        self.layers = self.layers[: self.depth]
        if prune_norm:
            self.norm_f = AddResidual()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def pool(self, x: Tensor, pool_type: GlobalPool | None = None) -> Tensor:
        """Pool the tokens that `forward_features` returns; see `global_pool`."""
        kind = self.global_pool if pool_type is None else self._check_pool(pool_type)
        if kind == "token":
            return x[:, : self.num_prefix_tokens].mean(1) if self.num_prefix_tokens > 1 else x[:, 0]
        if kind == "avg":
            return x[:, self.num_prefix_tokens :].mean(1)
        return x[:, -1] if kind == "last" else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify the tokens that `forward_features` returns; `pre_logits` stops before the head."""
        x = self.head_drop(self.pool(x))
        if pre_logits:
            return x
        x = classify(self.head, x)
        return x.max(dim=1).values if self.global_pool == "max" else x

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        """Return the logits, (batch, num_classes), or with `return_features` the input of the head.

        Args:
            x: Images, (batch, in_chans, height, width).
            return_features: The original's name for `pre_logits` of `forward_head`.
        """
        # By identity: while torch.fx traces, the flag is a proxy that has no truth value.
        return self.forward_head(self.forward_features(x), pre_logits=return_features is True)
