"""The bidirectional Mamba mixer, with the parameter names of the released checkpoints."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, NoReturn, get_args

import torch
from torch import Tensor, nn

from vim.layers.arguments import refuse_arguments
from vim.layers.checks import check_counts, check_kind
from vim.layers.init import init_bias, init_dt_proj, init_out_proj
from vim.layers.traced import fx_leaf
from vim.layers.watched import is_causal_convolution, is_projection
from vim.ops import InnerWeights, bidirectional_mixer, causal_conv1d, causal_conv1d_update, selective_scan
from vim.ops.common.checks import check_memory

Directions = Literal["none", "v1", "v2"]
Merge = Literal["mean", "sum"]
StepInit = Literal["random", "constant"]


class _Direction(NamedTuple):
    """Modules and parameters of one direction."""

    # Usually Conv1d and Linear, but users may replace them by anything callable.
    conv1d: Any
    x_proj: Any
    dt_proj: Any
    A_log: Tensor
    D: Tensor
    reverse: bool


class Mamba(nn.Module):
    """Mamba mixer that scans the sequence in one direction or in both.

    `in_proj`, `x_proj` and `out_proj` are called as modules. The kernels read the weights of the convolutions and of
    `dt_proj`. If one of them has a hook, a wrapper or a quantised weight, it is called instead, for its direction.
    `A_log`, `D` and `dt_proj.bias` are converted to float32.

    Args:
        d_model: Width of the tokens.
        d_state: Size of the state of each channel.
        d_conv: Taps of the causal convolution.
        expand: Inner width over `d_model`; d_inner = int(expand * d_model).
        dt_rank: Rank of the step size's projection; "auto" is ceil(d_model / 16).
        dt_min, dt_max: Range of the step size at initialisation, drawn log-uniformly.
        dt_init: Initial `dt_proj.weight`: "random", uniform up to a bound, or "constant", equal to the bound.
        dt_scale: Factor on the bound dt_rank ** -0.5 of `dt_proj.weight` at initialisation.
        dt_init_floor: Smallest step size at initialisation.
        conv_bias: Give the convolutions a bias.
        bias: Give `in_proj` and `out_proj` a bias.
        directions: "none" scans forward only. "v1" adds a backward scan with its own decay (`A_b_log`), which shares
            the rest and reads the forward convolution's output. "v2" gives the backward direction its own conv1d,
            x_proj, dt_proj, A and D.
        merge: "mean" or "sum" of the two directions.
        layer_scale: Initial value of a factor per channel on the output; `None` leaves it out.
        device, dtype: Of the parameters.

    Shape:
        (batch, len, d_model) -> (batch, len, d_model).

    Raises:
        TypeError: An argument is unknown.
        ValueError: A size is not positive, or `directions` or `merge` is unknown.

    Source: Zhu et al. 2024, arXiv:2401.09417, Algorithm 1 ("v2"); Table 4 compares the directions.
    """

    A_log: Tensor
    D: Tensor
    A_b_log: Tensor
    D_b: Tensor

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: StepInit = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        directions: Directions = "v2",
        merge: Merge = "mean",
        layer_scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown: NoReturn,
    ) -> None:
        super().__init__()
        refuse_arguments("Mamba", unknown, "translate_mixer_args")
        check_counts(1, d_model=d_model, d_state=d_state, d_conv=d_conv)
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        check_counts(1, dt_rank=rank)
        check_kind("directions", directions, get_args(Directions))
        check_kind("merge", merge, get_args(Merge))
        check_kind("dt_init", dt_init, get_args(StepInit))
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min and dt_max must satisfy 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")
        self.d_model, self.d_state, self.d_conv, self.expand, self.dt_rank = d_model, d_state, d_conv, expand, rank
        self.d_inner = int(expand * d_model)
        check_counts(1, d_inner=self.d_inner)
        self.dt_min, self.dt_max, self.dt_init = dt_min, dt_max, dt_init
        self.dt_scale, self.dt_init_floor = dt_scale, dt_init_floor
        self.directions, self.merge, self.layer_scale = directions, merge, layer_scale
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}

        # Registered in the order of the released state dicts: optimizer states refer to parameters by index.
        self.gamma = None if layer_scale is None else nn.Parameter(torch.empty(d_model, **factory_kwargs))
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory_kwargs)
        self._add_convolution("conv1d", conv_bias, factory_kwargs)
        self.act = nn.SiLU()
        self._add_projections("", factory_kwargs)
        self._add_decay("A_log", "D", factory_kwargs)
        if directions != "none":
            self._add_decay("A_b_log", "D_b" if directions == "v2" else None, factory_kwargs)
        if directions == "v2":
            self._add_convolution("conv1d_b", conv_bias, factory_kwargs)
            self._add_projections("_b", factory_kwargs)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory_kwargs)
        self._init_own_parameters()

    def _add_convolution(self, name: str, bias: bool, factory_kwargs: dict[str, Any]) -> None:
        taps, dim = self.d_conv, self.d_inner
        self.add_module(name, nn.Conv1d(dim, dim, taps, groups=dim, padding=taps - 1, bias=bias, **factory_kwargs))

    def _add_projections(self, suffix: str, factory_kwargs: dict[str, Any]) -> None:
        width = self.dt_rank + 2 * self.d_state
        self.add_module(f"x_proj{suffix}", nn.Linear(self.d_inner, width, bias=False, **factory_kwargs))
        self.add_module(f"dt_proj{suffix}", nn.Linear(self.dt_rank, self.d_inner, bias=True, **factory_kwargs))

    def _add_decay(self, A_name: str, D_name: str | None, factory_kwargs: dict[str, Any]) -> None:
        self.register_parameter(A_name, nn.Parameter(torch.empty(self.d_inner, self.d_state, **factory_kwargs)))
        if D_name is not None:
            self.register_parameter(D_name, nn.Parameter(torch.empty(self.d_inner, **factory_kwargs)))

    def reset_parameters(self) -> None:
        """Draw all parameters again: linear layers and convolutions as in PyTorch, the rest as in Mamba."""
        for module in self.children():
            if isinstance(module, (nn.Linear, nn.Conv1d)):
                module.reset_parameters()
        self._init_own_parameters()

    @torch.no_grad()
    def _init_own_parameters(self) -> None:
        """Set the decay to -(1..d_state), D to 1, step sizes log-uniform, the layer scale to its initial value."""
        log_states = torch.arange(1, self.d_state + 1, dtype=torch.float32).log()
        for direction in self._directions():
            direction.A_log.copy_(log_states.to(direction.A_log.device).expand_as(direction.A_log))
            direction.D.fill_(1.0)
            init_dt_proj(
                direction.dt_proj,
                self.dt_min,
                self.dt_max,
                self.dt_scale,
                self.dt_init_floor,
                self.dt_init == "constant",
            )
        if self.gamma is not None and self.layer_scale is not None:
            self.gamma.fill_(self.layer_scale)

    def init_in_model(self, depth: int) -> None:
        """Initialise what depends on the model's depth: scale `out_proj` by 1 / sqrt(depth), and zero the biases."""
        init_out_proj(self.out_proj, depth)
        init_bias(self.in_proj)

    @fx_leaf
    def forward(self, hidden_states: Tensor) -> Tensor:
        """Mix the tokens, (batch, len, d_model) -> (batch, len, d_model)."""
        self._check_tokens(hidden_states)
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        directions = self._directions()
        if self.directions == "v2" and all(map(self._can_fuse, directions)):
            y = self._scan_fused(x, z, directions)
        else:
            y = self._scan_separately(x, z, directions)
        return self._project(y)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mix the next token of each sequence, and update the states in place.

        Steps over a sequence give what `forward` gives over the whole. Several tokens may come at once, such as a
        prompt. Generate under `torch.no_grad()`; otherwise the states keep the graph of all steps.

        Args:
            hidden_states: (batch, len, d_model); len is 1 for one token.
            conv_state, ssm_state: From `allocate_inference_cache`, or as the step before left them.

        Returns:
            The mixed tokens, (batch, len, d_model), and both states.

        Raises:
            ValueError: The mixer is bidirectional, or a shape does not fit.

        Source: arguments of mamba-ssm's `Mamba.step`.
        """
        self._check_unidirectional("step")
        self._check_tokens(hidden_states)
        batch = hidden_states.shape[0]
        _check_state("conv_state", conv_state, (batch, self.d_inner, self.d_conv), "(batch, d_inner, d_conv)")
        _check_state("ssm_state", ssm_state, (batch, self.d_inner, self.d_state), "(batch, d_inner, d_state)")
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        (direction,) = self._directions()
        u = self._convolve_next(x, direction, conv_state)
        inputs = self._inputs_of_scan(u, direction.x_proj(u).to(u.dtype), z, direction)
        # A backward pass needs the state that is overwritten.
        before = ssm_state.clone() if torch.is_grad_enabled() else ssm_state
        y, last_state = selective_scan(**inputs, return_last_state=True, initial_state=before)
        ssm_state.copy_(last_state)
        return self._project(y.mT), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the states that `step` starts with: zeros on the device of the weights.

        Args:
            batch_size: Number of sequences.
            max_seqlen: Not used, because the states do not grow with the sequence; mamba-ssm has this argument.
            dtype: Of both states. `None` gives the convolution's state the dtype of its weight, and the scan's state
                the dtype of its arithmetic: float32, or float64 for float64 weights.

        Returns:
            conv_state, (batch, d_inner, d_conv): the last tokens before the convolution. ssm_state, (batch, d_inner,
            d_state): the state of the scan.

        Raises:
            ValueError: The mixer is bidirectional, or `batch_size` is not positive.
        """
        self._check_unidirectional("allocate_inference_cache")
        check_counts(1, batch_size=batch_size)
        weight, device = self.in_proj.weight, self.A_log.device
        conv_dtype, ssm_dtype = dtype or weight.dtype, dtype or torch.promote_types(torch.float32, self.A_log.dtype)
        conv_state = torch.zeros(batch_size, self.d_inner, self.d_conv, dtype=conv_dtype, device=device)
        return conv_state, torch.zeros(batch_size, self.d_inner, self.d_state, dtype=ssm_dtype, device=device)

    def _check_tokens(self, hidden_states: Tensor) -> None:
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != self.d_model:
            shape = tuple(hidden_states.shape)
            raise ValueError(f"hidden_states must be (batch, len, d_model) with d_model = {self.d_model}, got {shape}")

    def _check_unidirectional(self, method: str) -> None:
        if self.directions != "none":
            raise ValueError(
                f"{method} needs a mixer with directions='none', got {self.directions!r}: a backward scan begins at "
                "the last token, so each new token changes the results of all others"
            )

    def _project(self, y: Tensor) -> Tensor:
        """Project the scanned tokens to (batch, len, d_model), and scale them."""
        out = self.out_proj(y)
        if self.gamma is None:
            return out
        check_memory("gamma", self.gamma)
        return out * self.gamma

    def _directions(self) -> list[_Direction]:
        own = self._modules
        directions = [
            _Direction(own["conv1d"], own["x_proj"], own["dt_proj"], self.A_log, self.D, False),
        ]
        if self.directions == "v1":
            directions.append(directions[0]._replace(A_log=self.A_b_log, reverse=True))
        elif self.directions == "v2":
            backward = (own["conv1d_b"], own["x_proj_b"], own["dt_proj_b"], self.A_b_log, self.D_b)
            directions.append(_Direction(*backward, True))
        return directions

    def _can_fuse(self, d: _Direction) -> bool:
        """Return True if the kernels may read the convolution and the step size projection of a direction."""
        return is_causal_convolution(d.conv1d, self.act) and is_projection(d.dt_proj, self.dt_rank, self.d_inner)

    def _scan_fused(self, x: Tensor, z: Tensor, directions: list[_Direction]) -> Tensor:
        """Run both directions in fused kernels; (batch, len, d_inner)."""
        forward, backward = (_inner_weights(d) for d in directions)
        return bidirectional_mixer(x, z, forward, backward, self.merge)

    def scan_inputs(self, hidden_states: Tensor) -> list[dict[str, Any]]:
        """Return the arguments of `vim.ops.selective_scan` for each direction, computed from tokens.

        The mixer adds the outputs of these scans, or takes their mean (`merge`), and projects the result.

        Args:
            hidden_states: (batch, len, d_model).
        """
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        return self._inputs_of_scans(x, z, self._directions())

    def _scan_separately(self, x: Tensor, z: Tensor, directions: list[_Direction]) -> Tensor:
        """Run one direction after the other, calling modules that the kernels may not read; (batch, len, d_inner)."""
        outputs: list[Any] = [selective_scan(**inputs) for inputs in self._inputs_of_scans(x, z, directions)]
        y = outputs[0].mT if len(outputs) == 1 else outputs[0].mT + outputs[1].mT
        return y / 2 if len(outputs) == 2 and self.merge == "mean" else y

    def _inputs_of_scans(self, x: Tensor, z: Tensor, directions: list[_Direction]) -> list[dict[str, Any]]:
        inputs = []
        u = x_dbl = x
        for d in directions:
            if not (d.reverse and self.directions == "v1"):  # v1: the backward scan reads the forward projections
                u = self._convolve(x, d)
                x_dbl = d.x_proj(u).to(u.dtype)
            inputs.append(self._inputs_of_scan(u, x_dbl, z, d))
        return inputs

    def _convolve(self, x: Tensor, d: _Direction) -> Tensor:
        """Convolve causally, anti-causally in the reverse direction, and activate; (batch, len, d_inner)."""
        if is_causal_convolution(d.conv1d, self.act):
            weight, bias = d.conv1d.weight.flatten(1), d.conv1d.bias
            return causal_conv1d(x.mT, weight, bias, "silu", reverse=d.reverse).mT
        x = x.flip(1) if d.reverse else x
        u = self.act(d.conv1d(x.mT)[..., : x.shape[1]]).mT
        return u.flip(1) if d.reverse else u

    def _convolve_next(self, x: Tensor, d: _Direction, conv_state: Tensor) -> Tensor:
        """Convolve the next tokens, and put them into the state; (batch, len, d_inner)."""
        if is_causal_convolution(d.conv1d, self.act):
            return causal_conv1d_update(x.mT, conv_state, d.conv1d.weight.flatten(1), d.conv1d.bias, "silu").mT
        joined = torch.cat([conv_state.to(x.dtype), x.mT], dim=-1)
        conv_state.copy_(joined[..., x.shape[1] :])
        return self.act(d.conv1d(joined)[..., self.d_conv : joined.shape[-1]]).mT

    def _inputs_of_scan(self, u: Tensor, x_dbl: Tensor, z: Tensor, d: _Direction) -> dict[str, Any]:
        """Return the arguments of the gated scan of one direction, whose output is (batch, d_inner, len)."""
        dt, B, C = x_dbl.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta_bias = None
        if is_projection(d.dt_proj, self.dt_rank, self.d_inner):
            delta, delta_bias = nn.functional.linear(dt, d.dt_proj.weight.to(dt.dtype)), d.dt_proj.bias
        else:
            delta = d.dt_proj(dt)
        check_memory("A_b_log" if d.reverse else "A_log", d.A_log)
        return {
            "u": u.mT,
            "delta": delta.to(u.dtype).mT,
            "A": -torch.exp(d.A_log.to(torch.promote_types(torch.float32, d.A_log.dtype))),
            "B": B.mT,
            "C": C.mT,
            "D": d.D,
            "z": z.to(u.dtype).mT,
            "delta_bias": delta_bias,
            "delta_softplus": True,
            "reverse": d.reverse,
        }


def _check_state(name: str, state: Tensor, shape: tuple[int, ...], axes: str) -> None:
    if tuple(state.shape) != shape:
        raise ValueError(f"{name} must be {axes} = {shape}, got {tuple(state.shape)}")
    check_memory(name, state)


def _inner_weights(d: _Direction) -> InnerWeights:
    """Return the weights of a direction for the fused kernels."""
    conv, dt_proj = d.conv1d._parameters, d.dt_proj._parameters
    return InnerWeights(
        conv["weight"].flatten(1), conv["bias"], d.x_proj, dt_proj["weight"], dt_proj["bias"], d.A_log, d.D
    )
