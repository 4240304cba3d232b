"""A block asks one question: may one op run in place of its modules? Only where nobody could tell the difference."""

from __future__ import annotations

import copy
import ctypes
import threading

import numpy as np
import pytest
import torch
from torch import nn

import vim
from tests.helpers import TOLERANCES, assert_close
from vim.layers import Block, LayerNorm, RMSNorm, block
from vim.ops import available_backends, default_backend

pytestmark = pytest.mark.skipif(
    "native" not in available_backends("bidirectional_block"), reason="no native kernels: blocks run by their modules"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PARTS = ("norm", "mixer", *(f"mixer.{n}" for n in ("in_proj", "conv1d", "x_proj", "dt_proj", "act", "out_proj")))


def make_block(dtype: torch.dtype = torch.float32, **settings) -> Block:
    torch.manual_seed(0)
    made = Block(vim.Mamba(24, d_state=5, **settings), RMSNorm(24))
    for name, p in made.named_parameters():
        if "A_" not in name:
            nn.init.normal_(p, std=0.3)
    return made.to(dtype).eval()


def make_inputs(
    batch: int = 2, length: int = 7, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, length, 24).to(dtype), torch.randn(batch, length, 24)


@pytest.fixture
def calls(monkeypatch) -> list[bool]:
    """For each block that ran, whether the op ran in place of its modules."""
    seen, original = [], block.plain_weights

    def counted(*args):
        result = original(*args)
        seen.append(result is not None)
        return result

    monkeypatch.setattr(block, "plain_weights", counted)
    return seen


def by_modules(made: Block, *inputs: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    normed, residual = made.norm(*inputs)
    return made.mixer(normed), residual


def assert_same(made: Block, *inputs: torch.Tensor | None) -> None:
    value, gradient, *_ = (4 * t for t in TOLERANCES[inputs[0].dtype])
    actual, expected = made(*inputs), by_modules(made, *inputs)
    for got, wanted in zip(actual, expected, strict=True):
        assert got.dtype is wanted.dtype
        assert_close(got, wanted, value)
    if torch.is_grad_enabled():
        weights = [p for p in made.parameters() if p.requires_grad]
        cotangent = torch.randn_like(actual[0])
        grads = (torch.autograd.grad(y[0], weights, cotangent, allow_unused=True) for y in (actual, expected))
        for got, wanted in zip(*grads, strict=True):
            assert (got is None) == (wanted is None)
            if got is not None:
                assert_close(got, wanted, gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "length"), [(2, 7), (1, 1), (3, 130)])
@pytest.mark.parametrize("settings", [{}, {"bias": True, "conv_bias": False, "merge": "sum"}], ids=["plain", "other"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_numbers_of_the_modules(dtype, batch, length, settings, mode, calls):
    made = make_block(dtype, **settings)
    x, residual = make_inputs(batch, length, dtype)
    with mode():
        assert_same(made, x, None)
        assert_same(made, x, residual)
        assert_same(made, torch.cat((x, x), dim=2)[..., ::2], residual)
    assert calls == [True] * 3


# ---- weights are read where they are ---------------------------------------------------------------------------------


def _through_numpy(p: nn.Parameter, at: int) -> None:
    p.detach().numpy().reshape(-1)[at] += 0.5


def _through_data(p: nn.Parameter, at: int) -> None:
    p.data.view(-1)[at] += 0.5


def _through_dlpack(p: nn.Parameter, at: int) -> None:
    torch.from_dlpack(p.detach()).view(-1)[at] += 0.5


def _through_a_pointer(p: nn.Parameter, at: int) -> None:
    array = (ctypes.c_float * p.numel()).from_address(p.data_ptr())
    array[at] += 0.5


def _through_other_memory(p: nn.Parameter, at: int) -> None:
    changed = p.detach().clone()
    changed.view(-1)[at] += 0.5
    p.data = changed


WRITES = [_through_numpy, _through_data, _through_dlpack, _through_a_pointer, _through_other_memory]


@pytest.mark.parametrize("write", WRITES)
@torch.no_grad()
def test_a_single_number_written_into_any_weight_is_used_at_once(write, calls):
    made, inputs = make_block(bias=True), make_inputs()
    for name, p in made.named_parameters():
        for at in {0, p.numel() // 2 + 1, p.numel() - 1}:
            before, old = made(*inputs)[0], p.clone()
            write(p, at)
            after = made(*inputs)[0]
            assert not torch.equal(after, before), (name, at)
            assert torch.equal(after, copy.deepcopy(made)(*inputs)[0]), (name, at)
            p.copy_(old)
    assert all(calls)


@torch.no_grad()
def test_weights_of_a_memory_map_are_used_as_they_are(tmp_path):
    """Another process, or another map of the same file, may write them."""
    made, inputs = make_block(), make_inputs()
    weight = made.mixer.in_proj.weight
    path = tmp_path / "weight"
    weight.numpy().tofile(path)
    shape = tuple(weight.shape)
    weight.data = torch.from_numpy(np.memmap(path, np.float32, "r+", shape=shape))
    before = made(*inputs)[0]
    elsewhere = np.memmap(path, np.float32, "r+", shape=shape)
    elsewhere[3, 5] += 10
    after = made(*inputs)[0]
    assert not torch.equal(after, before)
    assert torch.equal(after, copy.deepcopy(made)(*inputs)[0])


@torch.no_grad()
def test_no_memory_is_kept_after_a_call():
    made, inputs = make_block(), make_inputs()
    made(*inputs)
    # Modules of torch's own classes, without anything beside what they are built with.
    assert type(made.mixer.in_proj) is nn.Linear
    assert set(made.mixer.__dict__) == set(vim.Mamba(24, d_state=5).__dict__)


# ---- the question ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARTS)
@torch.no_grad()
def test_hooks_on_any_part_fire_and_may_change_its_output(name, calls):
    made, inputs, seen = make_block(), make_inputs(), []
    before = made(*inputs)[0]
    part = made.get_submodule(name)
    handle = part.register_forward_pre_hook(lambda module, args: seen.append(name))
    made(*inputs)
    assert seen
    handle.remove()
    count = len(seen)
    part.forward = lambda *args, original=part.forward: [seen.append(name), original(*args)][1]
    made(*inputs)
    assert len(seen) > count
    del part.forward
    assert torch.equal(made(*inputs)[0], before)
    assert calls == [True, False, False, True]


@torch.no_grad()
def test_global_hooks_see_every_part(calls):
    made, inputs, seen = make_block(), make_inputs(), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.add(module))
    try:
        made(*inputs)
    finally:
        handle.remove()
    assert {made.norm, made.mixer, made.mixer.in_proj, made.mixer.x_proj_b, made.mixer.out_proj} <= seen
    assert calls == [False]


def _as_buffer(part: nn.Module) -> None:
    bias = part.bias.detach()
    del part.bias
    part.register_buffer("bias", bias)


@pytest.mark.parametrize("name", ["in_proj", "conv1d", "conv1d_b", "out_proj"])
@torch.no_grad()
def test_a_bias_that_is_not_a_parameter_takes_part(name):
    made, inputs = make_block(bias=True), make_inputs()
    expected = made(*inputs)[0]
    _as_buffer(made.mixer.get_submodule(name))
    torch.testing.assert_close(made(*inputs)[0], expected)


@pytest.mark.parametrize(
    ("owner", "name", "times"),
    [(nn.functional, "linear", 4), (nn.Linear, "__call__", 4), (nn.Module, "__call__", 6), (vim.Mamba, "__call__", 1)],
)
@torch.no_grad()
def test_profilers_that_patch_a_function_or_a_call_see_it(owner, name, times, calls, monkeypatch):
    made, inputs, seen, original = make_block(), make_inputs(), [], getattr(owner, name)
    before = made(*inputs)[0]
    monkeypatch.setattr(owner, name, lambda *args: [seen.append(args[0]), original(*args)][1])
    torch.testing.assert_close(made(*inputs)[0], before)
    assert len(seen) >= times
    monkeypatch.undo()
    assert calls == [True, False]


@pytest.mark.parametrize("kind", [vim.Mamba, RMSNorm, nn.Linear])
@torch.no_grad()
def test_another_forward_of_a_class_is_called(kind, calls, monkeypatch):
    made, inputs, seen, original = make_block(), make_inputs(), [], kind.forward
    before = made(*inputs)[0]
    monkeypatch.setattr(kind, "forward", lambda module, *args: [seen.append(module), original(module, *args)][1])
    assert_close(made(*inputs)[0], before, 1e-5)
    assert seen
    assert calls == [True, False]


def _convolution(**settings) -> nn.Conv1d:
    torch.manual_seed(2)
    return nn.Conv1d(48, 48, **{"kernel_size": 4, "padding": 3, "groups": 48, **settings})


class _Linear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class _Tripled(nn.Parameter):
    """A weight that changes what functions do with it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            y = function(*args, **(kwargs or {}))
            return 3 * y if function is nn.functional.linear else y


def _tripled(linear: nn.Linear) -> None:
    linear.weight = _Tripled(linear.weight.detach())


def _sparse(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.detach().to_sparse_csr(), requires_grad=False)


def _widened(made: Block) -> None:
    """More outputs than the block's inputs: its last layer may have them."""
    made.mixer.out_proj = nn.Linear(48, 32)


CHANGES = {
    "layer norm": lambda made: setattr(made, "norm", LayerNorm(24)),
    "subclass": lambda made: setattr(made.mixer, "out_proj", _Linear(48, 24)),
    "other directions": lambda made: setattr(made.mixer, "directions", "v1"),
    "parametrised": lambda made: nn.utils.parametrizations.weight_norm(made.mixer.dt_proj),
    "bias of x_proj": lambda made: setattr(made.mixer.x_proj, "bias", nn.Parameter(torch.randn(12))),
    "bias of in_proj": lambda made: _as_buffer(made.mixer.in_proj),
    "bias of a convolution": lambda made: _as_buffer(made.mixer.conv1d_b),
    "compiled": lambda made: made.mixer.compile(backend="eager"),
    "float64": lambda made: made.double(),
    "activation": lambda made: setattr(made.mixer, "act", nn.GELU()),
    "dense filter": lambda made: setattr(made.mixer, "conv1d", _convolution(groups=1)),
    "grouped filter": lambda made: setattr(made.mixer, "conv1d_b", _convolution(groups=12)),
    "dilated filter": lambda made: setattr(made.mixer, "conv1d", _convolution(dilation=2, padding=6)),
    "circular padding": lambda made: setattr(made.mixer, "conv1d", _convolution(padding_mode="circular")),
    "more padding": lambda made: setattr(made.mixer, "conv1d_b", _convolution(padding=4)),
    "another width": lambda made: setattr(made.mixer, "conv1d_b", _convolution(padding=0, kernel_size=1)),
    "no bias of dt_proj": lambda made: setattr(made.mixer, "dt_proj", nn.Linear(2, 48, bias=False)),
    "a subclass of a weight": lambda made: _tripled(made.mixer.dt_proj),
    "sparse weights": lambda made: _sparse(made.mixer.in_proj),
    "more outputs": _widened,
    "a wrapper": lambda made: setattr(made.mixer, "in_proj", nn.Sequential(made.mixer.in_proj)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_other_blocks_are_left_to_their_modules(change, calls):
    """A hook that does nothing, and makes modules be called, changes nothing."""
    made, (x, residual) = make_block(bias=True), make_inputs()
    change(made)
    x = x.to(next(made.mixer.in_proj.parameters()).dtype)
    plain = made(x, residual)
    for part in made.mixer.children():
        part.register_forward_hook(lambda *_: None)
    for actual, hooked in zip(plain, made(x, residual), strict=True):
        assert_close(actual, hooked, 1e-5)
    assert calls == [False] * 2


def test_a_module_that_takes_no_part_changes_nothing(calls):
    made, inputs = make_block(), make_inputs()
    made.mixer.register_module("adapter", None)
    made.mixer.probe = nn.Dropout()
    assert_same(made, *inputs)
    assert calls == [True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("of_model", [torch.float32, torch.bfloat16])
def test_a_residual_of_another_dtype_is_summed_as_the_norm_does(of_model, dtype, calls):
    x, residual = make_inputs(dtype=of_model)
    assert_same(make_block(of_model), x, residual.to(dtype))
    assert calls == [False]


def test_settings_that_are_wrong_have_the_words_of_the_modules(calls):
    made, inputs = make_block(), make_inputs()
    with pytest.raises(ValueError, match=r"residual must be .* = \(2, 7, 24\), got \(1, 7, 24\)"):
        made(inputs[0], inputs[1][:1])
    made.mixer.merge = "max"
    with pytest.raises(ValueError, match=r"merge must be one of .*'max'"):
        made(*inputs)
    made.norm.eps = -1.0
    with pytest.raises(ValueError, match="eps must be > 0, got -1"):
        made(*inputs)
    for odd in (None, "1e-5"):
        made.norm.eps = odd
        with pytest.raises(TypeError, match=f"eps must be a number > 0, got {odd!r}"):
            made(*inputs)
    assert calls == [False] * 5


def test_a_mixer_whose_output_nobody_uses_has_no_gradients():
    """Zeros would let an optimizer decay its weights."""
    made, (x, residual) = make_block(), make_inputs()
    x.requires_grad_()
    total = made(x, residual)[1]
    grads = torch.autograd.grad(total.sum(), [x, *made.mixer.parameters()], allow_unused=True)
    assert torch.equal(grads[0], torch.ones_like(x))
    assert all(gradient is None for gradient in grads[1:])


@pytest.mark.parametrize("merge", ["mean", "sum"])
def test_a_layer_scale_is_left_to_the_modules(merge, calls):
    assert_same(make_block(layer_scale=0.1, merge=merge), *make_inputs())
    assert calls == [False]


def test_modes_are_respected(calls):
    made, inputs = make_block(), make_inputs()
    expected = made(*inputs)[0]
    for backend in ("reference", "native"):
        with default_backend(backend):
            assert_close(made(*inputs)[0], expected, 1e-5)
    torch.func.vmap(lambda x: made(x[None])[0])(inputs[0])
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    assert_close(compiled(*inputs)[0], expected, 1e-5)
    traced = torch.jit.trace(made.mixer, inputs[0], check_trace=False)
    assert_close(traced(inputs[0]), made.mixer(inputs[0]), 1e-5)
    with torch.device("cpu"):  # a function mode
        assert torch.equal(made(*inputs)[0], expected)
    assert calls[:4] == [True, False, True, False]
    assert calls[-1] is True


def test_autocast(calls):
    made, (x, residual) = make_block(), make_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out, total = made(x, residual)
        expected, expected_total = by_modules(made, x, residual)
    assert out.dtype is expected.dtype is torch.bfloat16
    assert_close(out, expected, 4 * TOLERANCES[torch.bfloat16].value)
    assert torch.equal(total, expected_total)
    assert calls == [True]


def test_dtypes_that_do_not_fit_have_the_words_of_the_modules(calls):
    made = make_block(torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        made(*make_inputs())
    made.mixer.x_proj.float()
    with pytest.raises(RuntimeError, match="dtype"):
        made(*make_inputs(dtype=torch.bfloat16))
    assert calls == [False] * 2


@torch.no_grad()
def test_threads_may_share_a_block():
    made = make_block()
    inputs = [make_inputs(length=length) for length in range(3, 11)]
    expected = [made(*pair)[0] for pair in inputs]
    wrong = []

    def run(i: int) -> None:
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(made(*inputs[i])[0], expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_fewer_blocks_than_the_model_says_are_an_error(grad):
    model = vim.VisionMamba(img_size=32, embed_dim=24, depth=3, num_classes=3)
    del model.layers[2]
    with torch.set_grad_enabled(grad), pytest.raises(IndexError):
        model(torch.randn(1, 3, 32, 32))


def test_weights_that_were_never_loaded_are_refused():
    names = [name for name, _ in make_block().named_parameters()]
    for name in names:
        made, inputs = make_block(), make_inputs()
        part, _, last = name.rpartition(".")
        weight = made.get_parameter(name)
        setattr(made.get_submodule(part), last, nn.Parameter(weight.to("meta")))
        with pytest.raises(ValueError, match=r"\w+ must be on the device of the other arguments, cpu, got meta"):
            made(*inputs)


def test_a_layer_on_the_device_meta_has_shapes_only():
    out, total = make_block().to("meta")(*(x.to("meta") for x in make_inputs()))
    assert out.device.type == total.device.type == "meta"
    assert out.shape == total.shape == (2, 7, 24)
