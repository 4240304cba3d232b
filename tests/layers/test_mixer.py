"""The Mamba mixer: the original's numbers on every path, what sees its modules, initialisation, bad arguments."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import vim
from tests.helpers import assert_close, golden_mixer, golden_names
from tests.ops.conformance import check_golden_mixer

CASES = golden_names("mixer")


class _Wrapped(nn.Module):
    """What adapters do: another module in the place of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def _hook(mixer: vim.Mamba, names: tuple[str, ...]) -> None:
    for name in names:
        mixer.get_submodule(name).register_forward_hook(lambda *_: None)


def _wrap(mixer: vim.Mamba, names: tuple[str, ...]) -> None:
    for name in names:
        setattr(mixer, name, _Wrapped(mixer.get_submodule(name)))


# How a user can take modules out of the kernels' reach; each must give the same numbers.
_READ_BY_KERNELS = ("conv1d", "dt_proj", "conv1d_b", "dt_proj_b")
_PATHS = {
    "fused": lambda mixer, names: None,
    "all hooked": _hook,
    "all wrapped": _wrap,
    "forward convolution hooked": lambda mixer, names: _hook(mixer, names[:1]),
    "backward dt_proj wrapped": lambda mixer, names: _wrap(mixer, names[-1:]),
}


def test_all_golden_cases_are_there():
    assert len(CASES) == 10


def _take(path: str, mixer: vim.Mamba) -> None:
    _PATHS[path](mixer, tuple(name for name in _READ_BY_KERNELS if hasattr(mixer, name)))


@pytest.mark.parametrize("path", list(_PATHS))
@pytest.mark.parametrize("case", CASES)
def test_golden(case, path):
    check_golden_mixer(case, None, change=lambda mixer: _take(path, mixer))


@pytest.mark.parametrize("path", ["fused", "all hooked"])
@pytest.mark.parametrize("case", CASES)
def test_golden_of_the_cuda_kernels(case, path):
    """Emulated on the host"""
    check_golden_mixer(case, "emulated", change=lambda mixer: _take(path, mixer))


@pytest.mark.parametrize("case", CASES)
def test_golden_in_float64(case):
    mixer, tensors = golden_mixer(case)
    assert_close(mixer.double()(tensors["x"].double()), tensors["out64"], 1e-10)


@pytest.mark.parametrize("name", ["in_proj", "x_proj", "x_proj_b", "out_proj", *_READ_BY_KERNELS])
def test_hooks_see_every_projection_and_can_change_it(name):
    torch.manual_seed(0)
    mixer, x = vim.Mamba(16), torch.randn(2, 9, 16)
    before = mixer(x)
    calls = []

    def double(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(output.shape))
        return 2 * output

    handle = mixer.get_submodule(name).register_forward_hook(double)
    assert not torch.allclose(mixer(x), before)
    assert len(calls) == 1
    handle.remove()
    assert torch.equal(mixer(x), before)


def test_parametrized_and_replaced_layers_are_called():
    torch.manual_seed(0)
    mixer, x = vim.Mamba(16), torch.randn(2, 9, 16)
    expected = mixer(x)
    weight = mixer.dt_proj.weight.detach().clone()
    nn.utils.parametrizations.weight_norm(mixer.dt_proj)
    assert_close(mixer(x), expected, 1e-5)
    mixer.dt_proj = nn.Linear(mixer.dt_rank, mixer.d_inner, bias=False)
    with torch.no_grad():
        mixer.dt_proj.weight.copy_(weight)
    assert not torch.allclose(mixer(x), expected), "a dt_proj without a bias has no bias"


@pytest.mark.parametrize("directions", ["none", "v1", "v2"])
def test_autocast_keeps_decay_and_states_in_float32(directions):
    torch.manual_seed(0)
    mixer, x = vim.Mamba(32, directions=directions), torch.randn(2, 40, 32)
    expected = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = mixer(x)
    assert actual.dtype == torch.bfloat16
    assert_close(actual, expected, 3e-2)
    actual.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in mixer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_another_dtype(dtype):
    torch.manual_seed(0)
    mixer, x = vim.Mamba(32), torch.randn(2, 40, 32)
    expected = mixer(x)
    actual = copy.deepcopy(mixer).to(dtype)(x.to(dtype))
    assert actual.dtype == dtype
    assert_close(actual, expected, 3e-2)


def test_parameter_names_and_order():
    names = [
        "gamma", "A_log", "D", "A_b_log", "D_b", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight",
        "dt_proj.weight", "dt_proj.bias", "conv1d_b.weight", "conv1d_b.bias", "x_proj_b.weight", "dt_proj_b.weight",
        "dt_proj_b.bias", "out_proj.weight",
    ]  # fmt: skip
    assert list(vim.Mamba(16, layer_scale=0.1).state_dict()) == names
    v1 = [name for name in names[1:] if "_b." not in name and name != "D_b"]
    assert list(vim.Mamba(16, directions="v1").state_dict()) == v1
    assert list(vim.Mamba(16, directions="none").state_dict()) == [n for n in v1 if n != "A_b_log"]


def test_initialisation():
    torch.manual_seed(0)
    mixer = vim.Mamba(128, dt_rank=16, layer_scale=0.5)
    states = torch.arange(1, 17).log()
    for A_log, D, dt_proj, x_proj, conv in (
        (mixer.A_log, mixer.D, mixer.dt_proj, mixer.x_proj, mixer.conv1d),
        (mixer.A_b_log, mixer.D_b, mixer.dt_proj_b, mixer.x_proj_b, mixer.conv1d_b),
    ):
        assert torch.equal(A_log, states.expand(256, 16))
        assert torch.equal(D, torch.ones(256))
        assert dt_proj.weight.abs().max() <= 16**-0.5
        assert abs(dt_proj.weight.std().item() / (16**-0.5 / math.sqrt(3)) - 1) < 0.05
        log_dt = nn.functional.softplus(dt_proj.bias).log()
        assert math.log(1e-3) - 1e-3 <= log_dt.min() <= log_dt.max() <= math.log(1e-1) + 1e-3
        assert abs(log_dt.mean().item() - (math.log(1e-3) + math.log(1e-1)) / 2) < 0.3
        assert abs(log_dt.std().item() - math.log(100) / math.sqrt(12)) < 0.15
        # PyTorch's own: uniform within fan_in ** -0.5.
        assert abs(x_proj.weight.std().item() * math.sqrt(3 * 256) - 1) < 0.05
        assert abs(conv.weight.std().item() * math.sqrt(3 * 4) - 1) < 0.08
        assert conv.bias.abs().max() > 0
    assert torch.equal(mixer.gamma, torch.full((128,), 0.5))
    before = {name: p.detach().clone() for name, p in mixer.named_parameters()}
    mixer.reset_parameters()
    redrawn = {name for name, p in mixer.named_parameters() if not torch.equal(p, before[name])}
    assert redrawn == {n for n in before if "." in n}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"d_model": 0}, "d_model must be an integer >= 1, got 0"),
        ({"d_model": 16.0}, "d_model must be an integer >= 1, got 16.0"),
        ({"d_state": -1}, "d_state must be an integer >= 1, got -1"),
        ({"d_conv": 0}, "d_conv must be an integer >= 1, got 0"),
        ({"dt_rank": 0}, "dt_rank must be an integer >= 1, got 0"),
        ({"dt_rank": "full"}, "dt_rank must be an integer >= 1, got 'full'"),
        ({"expand": 0.01}, "d_inner must be an integer >= 1, got 0"),
        ({"directions": "v3"}, r"directions must be one of \['none', 'v1', 'v2'\], got 'v3'"),
        ({"merge": "max"}, r"merge must be one of \['mean', 'sum'\], got 'max'"),
        ({"dt_min": 0.2}, "dt_min and dt_max must satisfy 0 < dt_min <= dt_max, got 0.2 and 0.1"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        vim.Mamba(**{"d_model": 16, **kwargs})


def test_misspelt_argument():
    with pytest.raises(TypeError, match="dstate"):
        vim.Mamba(16, dstate=8)


@pytest.mark.parametrize("shape", [(2, 16), (2, 9, 15), (2, 0, 16)])
def test_bad_input(shape):
    with pytest.raises(ValueError, match=r"hidden_states must be \(batch, len, d_model\)|at least one token"):
        vim.Mamba(16)(torch.zeros(shape))


@pytest.mark.parametrize("path", ["plain", "convolution hooked", "dt_proj wrapped"])
@pytest.mark.parametrize("pieces", [(1,) * 9, (4, 1, 4)], ids=str)
def test_steps_equal_the_whole(pieces, path):
    torch.manual_seed(0)
    mixer = vim.Mamba(16, d_state=5, directions="none", layer_scale=0.5).double()
    if path == "convolution hooked":
        _hook(mixer, ("conv1d",))
    if path == "dt_proj wrapped":
        _wrap(mixer, ("dt_proj",))
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    states = mixer.allocate_inference_cache(2, 9)
    assert [tuple(state.shape) for state in states] == [(2, 32, 4), (2, 32, 5)]
    outputs = []
    for tokens in x.split(pieces, 1):
        out, *after = mixer.step(tokens, *states)
        assert all(a is b for a, b in zip(after, states, strict=True))
        outputs.append(out)
    leaves = [x, *mixer.parameters()]
    stepped, whole = torch.cat(outputs, 1), mixer(x)
    assert_close(stepped, whole, 1e-12)
    grads = (torch.autograd.grad(y.square().sum(), leaves) for y in (stepped, whole))
    for actual, expected in zip(*grads, strict=True):
        assert_close(actual, expected, 1e-10)


def test_states_of_steps():
    mixer = vim.Mamba(16, directions="none").bfloat16()
    assert [s.dtype for s in mixer.allocate_inference_cache(1, 9)] == [torch.bfloat16, torch.float32]
    assert {s.dtype for s in mixer.allocate_inference_cache(1, 9, torch.float16)} == {torch.float16}


@pytest.mark.parametrize("directions", ["v1", "v2"])
def test_a_bidirectional_mixer_has_no_steps(directions):
    mixer = vim.Mamba(16, directions=directions)
    with pytest.raises(ValueError, match=f"step needs a mixer with directions='none', got '{directions}'"):
        mixer.step(torch.zeros(1, 1, 16), torch.zeros(1, 32, 4), torch.zeros(1, 32, 16))
    with pytest.raises(ValueError, match="allocate_inference_cache needs a mixer with directions='none'"):
        mixer.allocate_inference_cache(1, 9)


def test_bad_states_of_a_step():
    mixer, x = vim.Mamba(16, directions="none"), torch.zeros(2, 1, 16)
    conv_state, ssm_state = mixer.allocate_inference_cache(2, 9)
    with pytest.raises(ValueError, match=r"conv_state must be .* = \(2, 32, 4\), got \(1, 32, 4\)"):
        mixer.step(x, conv_state[:1], ssm_state)
    with pytest.raises(ValueError, match=r"ssm_state must be .* = \(2, 32, 16\), got \(2, 32, 15\)"):
        mixer.step(x, conv_state, ssm_state[..., 1:])
