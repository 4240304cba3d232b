"""The functions of mamba-ssm and causal-conv1d: argument forms of their versions, values and gradients."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

import vim
from tests.helpers import TOLERANCES, assert_close
from vim.compat import causal_conv1d, mamba_ssm

BATCH, DIM, LEN, STATES, RANK, MODEL = 2, 8, 11, 3, 2, 5


def _randn(*shape: int, **kwargs) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), **kwargs)


def _close(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    assert_close(actual, expected, TOLERANCES[actual.real.dtype].gradient, what)


def _inner(A_dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    states = 2 * STATES if A_dtype.is_complex else STATES
    A = -_randn(DIM, STATES).exp()
    return {
        "xz": _randn(BATCH, 2 * DIM, LEN),
        "conv1d_weight": _randn(DIM, 1, 4),
        "conv1d_bias": _randn(DIM),
        "x_proj_weight": _randn(RANK + 2 * states, DIM),
        "delta_proj_weight": _randn(DIM, RANK),
        "out_proj_weight": _randn(MODEL, DIM),
        "out_proj_bias": _randn(MODEL),
        "A": torch.complex(A, _randn(STATES, DIM).T.contiguous()) if A_dtype.is_complex else A,
        "D": _randn(DIM),
        "delta_bias": _randn(DIM),
    }


def _by_hand(w: dict, reverse: bool = False, norms: tuple = (None, None, None), biases: tuple = (0, 0)) -> torch.Tensor:
    """The block between in_proj and out_proj, token by token; (batch, dim, len)."""
    x, z = w["xz"].chunk(2, 1)
    u = F.silu(F.conv1d(F.pad(x, (3, 0)), w["conv1d_weight"], w["conv1d_bias"], groups=DIM))
    states = STATES * (2 if w["A"].is_complex() else 1)
    parts = (u.mT @ w["x_proj_weight"].T).split([RANK, states, states], -1)
    dt, B, C = (p if s is None else F.rms_norm(p, p.shape[-1:], s, 1e-6) for p, s in zip(parts, norms, strict=True))
    B, C = B + biases[0], C + biases[1]
    delta = F.softplus(dt @ w["delta_proj_weight"].T + w["delta_bias"])
    if w["A"].is_complex():
        B, C = (torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) for t in (B, C))
    h, outputs = torch.zeros(BATCH, DIM, STATES, dtype=w["A"].dtype), {}
    for i in reversed(range(LEN)) if reverse else range(LEN):
        d = delta[:, i, :, None]
        h = torch.exp(d * w["A"]) * h + d * B[:, i, None] * u[:, :, i, None]
        y = (h * C[:, i, None]).sum(-1)
        y = 2 * y.real if y.is_complex() else y
        outputs[i] = (y + w["D"] * u[:, :, i]) * F.silu(z[:, :, i])
    return torch.stack([outputs[i] for i in range(LEN)], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_inner_functions(dtype):
    w = {name: t.requires_grad_() for name, t in _inner(dtype).items()}
    y = _by_hand(w)
    expected = F.linear(y.mT, w["out_proj_weight"], w["out_proj_bias"])
    for function in (mamba_ssm.mamba_inner_fn, mamba_ssm.mamba_inner_ref):
        out = function(**w)
        _close(out, expected)
        inputs = list(w.values())
        ours, theirs = (
            torch.autograd.grad(out.sum(), inputs),
            torch.autograd.grad(expected.sum(), inputs, retain_graph=True),
        )
        for name, got, wanted in zip(w, ours, theirs, strict=True):
            _close(got, wanted, what=name)
    without = {name: t for name, t in w.items() if not name.startswith("out_proj")}
    _close(mamba_ssm.mamba_inner_fn_no_out_proj(**without), y)


def test_inner_function_with_two_directions():
    w = _inner()
    A_b = -_randn(DIM, STATES).sin().exp()
    y = _by_hand(w) + _by_hand({**w, "A": A_b}, reverse=True)
    expected = F.linear(y.mT, w["out_proj_weight"], w["out_proj_bias"])
    _close(mamba_ssm.bimamba_inner_fn(**w, A_b=A_b), expected)
    _close(mamba_ssm.bimamba_inner_ref(**w, A_b=A_b), expected)


def test_inner_function_with_norms_and_biases():
    w = _inner()
    dt_scale, b_scale, c_scale, b_bias, c_bias = _randn(RANK), *(_randn(STATES) * k for k in (1, 2, 3, 4))
    y = _by_hand(w, norms=(dt_scale, b_scale, c_scale), biases=(b_bias, c_bias))
    out = mamba_ssm.mamba_inner_fn(
        **w,
        b_rms_weight=b_scale,
        c_rms_weight=c_scale,
        dt_rms_weight=dt_scale,
        B_proj_bias=b_bias,
        C_proj_bias=c_bias,
    )
    _close(out, F.linear(y.mT, w["out_proj_weight"], w["out_proj_bias"]))


def test_inner_function_with_given_maps():
    w = _inner()
    u = F.silu(F.conv1d(F.pad(w["xz"][:, :DIM], (3, 0)), w["conv1d_weight"], w["conv1d_bias"], groups=DIM))
    _, B, C = (u.mT @ w["x_proj_weight"].T).split([RANK, STATES, STATES], -1)
    expected = mamba_ssm.mamba_inner_fn(**w)
    given = {**w, "x_proj_weight": w["x_proj_weight"][:RANK], "B": B.mT, "C": C.mT}
    _close(mamba_ssm.mamba_inner_fn(**given), expected)
    with pytest.raises(ValueError, match=r"x_proj_weight must have dt_rank \+ B \+ C = \[2, 0, 0\] rows, got 8"):
        mamba_ssm.mamba_inner_fn(**{**w, "B": B.mT, "C": C.mT})


def test_scan_takes_mixed_dtypes_and_gives_the_last_state():
    u, delta, B, C = (_randn(BATCH, n, LEN) for n in (DIM, DIM, STATES, STATES))
    A = -_randn(DIM, STATES).exp()
    out, state = mamba_ssm.selective_scan_fn(u.bfloat16(), delta, A, B, C.bfloat16(), return_last_state=True)
    assert (out.dtype, state.dtype, state.shape) == (torch.bfloat16, torch.float32, (BATCH, DIM, STATES))
    halves = [t.bfloat16() for t in (u, delta)], [t.bfloat16() for t in (B, C)]
    assert torch.equal(out, vim.ops.selective_scan(*halves[0], A, *halves[1]))
    _close(mamba_ssm.selective_scan_ref(u, delta, A, B, C), vim.ops.selective_scan(u, delta, A, B, C))


def test_state_update_by_rows():
    state = _randn(5, DIM, STATES)
    rows = torch.tensor([3, 1])
    own = state[rows]
    inputs = _randn(2, DIM), _randn(2, DIM), -_randn(DIM, STATES).exp(), _randn(2, STATES), _randn(2, STATES)
    before = state.clone()
    out = mamba_ssm.selective_state_update(state, *inputs, state_batch_indices=rows)
    _close(out, mamba_ssm.selective_state_update_ref(own, *inputs))
    _close(state[rows], own)
    assert torch.equal(state[[0, 2, 4]], before[[0, 2, 4]])


@pytest.mark.parametrize("form", ["1.0", "1.2", "named"])
def test_convolution_of_each_version(form):
    x, weight, bias = _randn(BATCH, DIM, LEN), _randn(DIM, 4), _randn(DIM)
    forms = {
        "1.0": lambda f: f(x, weight, bias, "silu"),
        "1.2": lambda f: f(x, weight, bias, None, None, False, None, "silu"),
        "named": lambda f: f(x=x, weight=weight, bias=bias, activation="swish"),
    }
    expected = F.silu(F.conv1d(F.pad(x, (3, 0)), weight[:, None], bias, groups=DIM))
    _close(forms[form](causal_conv1d.causal_conv1d_fn), expected)
    _close(forms[form](causal_conv1d.causal_conv1d_ref), expected)


def test_convolution_with_states_continues_token_by_token():
    x, weight, bias = _randn(BATCH, DIM, LEN), _randn(DIM, 4), _randn(DIM)
    whole = causal_conv1d.causal_conv1d_fn(x, weight, bias, activation="silu")
    first, state = causal_conv1d.causal_conv1d_fn(x[..., :6], weight, bias, return_final_states=True, activation="silu")
    _close(first, whole[..., :6])
    state = state.contiguous()
    _close(causal_conv1d.causal_conv1d_update(x[..., 6], state, weight, bias, True), whole[..., 6])
    _close(causal_conv1d.causal_conv1d_update(x[..., 7:9], state, weight, bias, "silu"), whole[..., 7:9])
    _close(causal_conv1d.causal_conv1d_update_ref(x[..., 9:], state, weight, bias, "silu"), whole[..., 9:])


@pytest.mark.parametrize("is_rms", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_norms(is_rms, dtype, residual_dtype):
    x, weight, bias = _randn(3, 4, DIM).to(dtype), _randn(DIM), _randn(DIM + 1)[:DIM]
    residual = None if residual_dtype is None else _randn(4, 3, DIM).view(3, 4, DIM).to(residual_dtype)
    total = x.float() if residual is None else x.float() + residual.float()
    norm = F.rms_norm(total, (DIM,), weight, 1e-5) + bias if is_rms else F.layer_norm(total, (DIM,), weight, bias, 1e-5)
    for fp32 in (False, True):
        named = {"eps": 1e-5, "prenorm": True, "residual_in_fp32": fp32}
        y, kept = mamba_ssm.layer_norm_fn(x, weight, bias, residual, is_rms_norm=is_rms, **named)
        _close(y, norm.to(dtype))
        _close(kept, total.to(kept.dtype))
        wide = torch.float32 if fp32 else dtype
        assert kept.dtype == (wide if residual is None else residual_dtype)
        version_1 = mamba_ssm.layer_norm_fn_1(x, weight, bias, residual, 1e-5, True, fp32, is_rms)
        assert all(map(torch.equal, version_1, (y, kept)))
        if is_rms:
            assert torch.equal(mamba_ssm.rms_norm_fn(x, weight, bias, residual, eps=1e-5), y)
            assert torch.equal(mamba_ssm.rms_norm_fn_1(x, weight, bias, residual, True, fp32, 1e-5)[1], kept)


def test_norm_module():
    norm = mamba_ssm.RMSNorm(DIM, eps=1e-6)
    assert list(norm.state_dict()) == ["weight"]
    x = _randn(3, DIM)
    _close(norm(x), F.rms_norm(x, (DIM,), eps=1e-6))
    y, total = norm(x, x, prenorm=True)
    _close(y, norm(2 * x))
    assert torch.equal(total, 2 * x)
    with pytest.raises(ValueError, match="dropout_p must be left out"):
        mamba_ssm.RMSNorm(DIM, dropout_p=0.1)
    with pytest.raises(ValueError, match="x1 must be left out"):
        mamba_ssm.rms_norm_fn(x, norm.weight, None, x1=x)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (mamba_ssm.selective_scan_fn, "u delta A B C D z delta_bias delta_softplus return_last_state"),
        (
            mamba_ssm.mamba_inner_fn,
            "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight out_proj_weight out_proj_bias A B C D "
            "delta_bias B_proj_bias C_proj_bias delta_softplus checkpoint_lvl b_rms_weight c_rms_weight dt_rms_weight "
            "b_c_dt_rms_eps",
        ),
        (
            mamba_ssm.bimamba_inner_fn,
            "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight out_proj_weight out_proj_bias A A_b B C D "
            "delta_bias B_proj_bias C_proj_bias delta_softplus checkpoint_lvl",
        ),
        (
            mamba_ssm.mamba_inner_fn_no_out_proj,
            "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight A B C D delta_bias B_proj_bias C_proj_bias "
            "delta_softplus checkpoint_lvl",
        ),
        (
            mamba_ssm.selective_state_update,
            "state x dt A B C D z dt_bias dt_softplus state_batch_indices",
        ),
        (
            mamba_ssm.Mamba,
            "d_model d_state d_conv expand dt_rank dt_min dt_max dt_init dt_scale dt_init_floor conv_bias bias "
            "use_fast_path layer_idx device dtype bimamba_type if_devide_out init_layer_scale",
        ),
        (
            mamba_ssm.rms_norm_fn,
            "x weight bias residual x1 weight1 bias1 eps dropout_p rowscale prenorm residual_in_fp32 "
            "return_dropout_mask",
        ),
        (mamba_ssm.rms_norm_fn_1, "x weight bias residual prenorm residual_in_fp32 eps"),
        (
            causal_conv1d.causal_conv1d_fn,
            "x weight bias seq_idx initial_states return_final_states final_states_out activation",
        ),
        (
            causal_conv1d.causal_conv1d_update,
            "x conv_state weight bias activation cache_seqlens conv_state_indices",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_positional_arguments_are_those_of_the_packages(function, arguments):
    parameters = inspect.signature(function).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == arguments.split()
