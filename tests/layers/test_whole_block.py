"""A block in one call: the same bits as its modules give, never out of date, and out of the way of whoever watches."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vim
from vim.layers import Block, RMSNorm, block, whole_block
from vim.layers.linear import Linear
from vim.ops import default_backend, fast_linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WATCHED = ("norm", "mixer", *(f"mixer.{name}" for name in whole_block._PARTS))


def _block(dtype: torch.dtype = torch.float32, **settings) -> Block:
    torch.manual_seed(0)
    made = Block(vim.Mamba(24, d_state=5, **settings), RMSNorm(24))
    for name, p in made.named_parameters():
        if "A_" not in name:
            nn.init.normal_(p, std=0.3)
    return made.to(dtype).eval()


def _inputs(batch: int = 2, length: int = 7, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, length, 24).to(dtype), torch.randn(batch, length, 24)


@pytest.fixture
def calls(monkeypatch) -> list[bool]:
    """For each block that ran, whether it was one call."""
    seen, original = [], whole_block.ready_block

    def counted(*args):
        result = original(*args)
        seen.append(result is not None)
        return result

    monkeypatch.setattr(block, "ready_block", counted)
    return seen


def _by_modules(made: Block, *inputs: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    normed, residual = made.norm(*inputs)
    return made.mixer(normed), residual


def _assert_same(made: Block, *inputs: torch.Tensor | None) -> None:
    for actual, expected in zip(made(*inputs), _by_modules(made, *inputs), strict=True):
        assert actual.dtype is expected.dtype
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "length"), [(2, 7), (1, 1), (3, 130)])
@pytest.mark.parametrize("settings", [{}, {"bias": True, "conv_bias": False, "merge": "sum"}], ids=["plain", "other"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_bits_of_the_modules(dtype, batch, length, settings, mode, calls):
    made = _block(dtype, **settings)
    x, residual = _inputs(batch, length, dtype)
    with mode():
        _assert_same(made, x, None)
        _assert_same(made, x, residual)
        _assert_same(made, torch.cat((x, x), dim=2)[..., ::2], residual)
    assert calls == [True] * 3


@torch.no_grad()
def test_weights_of_several_dtypes(calls):
    made = _block(torch.bfloat16)
    made.mixer.A_log.data = made.mixer.A_log.data.double()
    made.norm.float()
    _assert_same(made, *_inputs(dtype=torch.bfloat16))
    made.mixer.x_proj.float()
    normed, _ = made.norm(*_inputs(dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="dtype"):
        made.mixer(normed)
    with pytest.raises(RuntimeError, match="dtype"):
        made(*_inputs(dtype=torch.bfloat16))
    assert calls == [True, False]


def _in_place(p: nn.Parameter) -> None:
    p.mul_(1.5)


def _through_data(p: nn.Parameter) -> None:
    p.data.mul_(1.5)


def _other_memory(p: nn.Parameter) -> None:
    p.data = p.data * 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", [_in_place, _through_data, _other_memory])
@torch.no_grad()
def test_a_change_of_any_weight_is_seen(dtype, change, calls):
    made, inputs = _block(dtype, bias=True), _inputs(dtype=dtype)
    for name, p in made.named_parameters():
        before = made(*inputs)[0]
        change(p)
        assert not torch.equal(made(*inputs)[0], before), name
        _assert_same(made, *inputs)
    assert all(calls)


@pytest.mark.parametrize("name", ["norm.weight", "mixer.in_proj.weight", "mixer.x_proj.weight", "mixer.D"])
@torch.no_grad()
def test_other_sizes_in_the_same_memory_are_seen(name):
    made, inputs = _block(torch.bfloat16), _inputs(dtype=torch.bfloat16)
    made(*inputs)
    p = made.get_parameter(name)
    p.data = p.data[:-2]
    with pytest.raises(ValueError, match="must"):
        made(*inputs)


@pytest.mark.parametrize("name", ["norm.weight", "mixer.D"])
@torch.no_grad()
def test_another_dtype_in_the_same_memory_is_seen(name, calls):
    made, inputs = _block(torch.bfloat16), _inputs(dtype=torch.bfloat16)
    made(*inputs)
    p = made.get_parameter(name)
    p.data = p.data.view(torch.float16)
    _assert_same(made, *inputs)
    assert calls == [True] * 2


@torch.no_grad()
def test_new_parameters_and_loaded_weights(calls):
    made, inputs = _block(), _inputs()
    made(*inputs)
    made.mixer.out_proj.weight = nn.Parameter(torch.randn_like(made.mixer.out_proj.weight))
    _assert_same(made, *inputs)
    made.load_state_dict({name: t + 0.1 for name, t in made.state_dict().items()})
    _assert_same(made, *inputs)
    made.to(torch.bfloat16)
    _assert_same(made, *_inputs(dtype=torch.bfloat16))
    assert calls == [True] * 4


def test_a_step_of_an_optimizer(calls):
    made, inputs = _block(), _inputs()
    with torch.no_grad():
        made(*inputs)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.5)
    made(*inputs)[0].square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        _assert_same(made, *inputs)
    assert calls == [True, False, True]


@torch.no_grad()
def test_copies_go_their_own_way():
    made, inputs = _block(), _inputs()
    before = made(*inputs)[0]
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        other.mixer.out_proj.weight.zero_()
        assert torch.count_nonzero(other(*inputs)[0]) == 0
        assert torch.equal(made(*inputs)[0], before)


@torch.no_grad()
def test_what_was_prepared_goes_with_the_block():
    made = _block()
    made(*_inputs())
    weight = weakref.ref(made.mixer.in_proj.weight)
    assert made.mixer in whole_block._prepared
    del made
    gc.collect()
    assert weight() is None


def _copies(made: Block) -> list[torch.Tensor]:
    return [copy for _, copy in whole_block._prepared[made.mixer]._copies]


@pytest.mark.parametrize("move", [lambda made: made.to("meta"), lambda made: made.bfloat16()], ids=["to", "bfloat16"])
@torch.no_grad()
def test_what_was_prepared_is_given_back_when_the_block_is_moved_or_cast(move):
    made = _block()
    made(*_inputs())
    memory = made.mixer.in_proj.weight.untyped_storage()
    held = [weakref.ref(t) for t in (*_copies(made), memory)]
    assert len(held) > 4
    del memory
    move(made)
    assert not any(ref() is not None for ref in held)


@torch.no_grad()
def test_weights_of_functional_call_are_given_back(calls):
    made, inputs = _block(), _inputs()
    expected = made(*inputs)[0]
    weights = {name: p.detach() * 1.5 for name, p in made.named_parameters()}
    other = torch.func.functional_call(made, weights, inputs)[0]
    memory = [weakref.ref(t.untyped_storage()) for t in weights.values()]
    held = [weakref.ref(t) for t in _copies(made)]
    del weights
    assert not any(ref() is not None for ref in memory + held)
    assert torch.equal(made(*inputs)[0], expected)
    assert not torch.equal(other, expected)
    assert calls == [True] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_swapped_weights(dtype, calls):
    made, inputs = [_block(dtype, bias=True) for _ in range(2)], _inputs(dtype=dtype)
    for p in made[1].parameters():
        p.mul_(1.5)
    before = [each(*inputs)[0] for each in made]
    for mine, others in zip(made[0].parameters(), made[1].parameters(), strict=True):
        torch.utils.swap_tensors(mine, others)
    assert not torch.equal(*before)
    for each, expected in zip(made, reversed(before), strict=True):
        assert torch.equal(each(*inputs)[0], expected)
        _assert_same(each, *inputs)
    assert all(calls)


@torch.no_grad()
def test_conversions_by_swapping(calls):
    made, inputs = _block(), _inputs()
    made(*inputs)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        made.load_state_dict({name: t * 1.5 for name, t in made.state_dict().items()})
        _assert_same(made, *inputs)
        made.bfloat16()
        _assert_same(made, *_inputs(dtype=torch.bfloat16))
        made.load_state_dict(_block(torch.bfloat16).state_dict(), assign=True)
        _assert_same(made, *_inputs(dtype=torch.bfloat16))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert all(calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("part", [0, 0.5])
@torch.no_grad()
def test_freed_memory_of_any_weight_is_an_error(part, dtype, calls):
    made, inputs = _block(dtype, bias=True), _inputs(dtype=dtype)
    expected = made(*inputs)[0]
    for name, p in made.named_parameters():
        values, memory = p.clone(), p.untyped_storage()
        memory.resize_(int(part * values.nbytes))
        with pytest.raises(RuntimeError, match=f"needs {values.nbytes} bytes of memory and its storage has"):
            made(*inputs)
        memory.resize_(values.nbytes)
        p.data.copy_(values * 1.5)
        assert not torch.equal(made(*inputs)[0], expected), name
        _assert_same(made, *inputs)
        p.data.copy_(values)
        assert torch.equal(made(*inputs)[0], expected)
    assert all(calls)


@pytest.mark.parametrize(
    ("name", "as_it_is", "copied"),
    [
        ("norm.weight", "weight", "norm_weight"),
        ("mixer.in_proj.weight", "in_proj", "in_proj"),
        ("mixer.out_proj.bias", "out_bias", "out_bias"),
        ("mixer.conv1d_b.weight", "weight of the backward direction", "conv_weight_b"),
        ("mixer.A_b_log", "A_log of the backward direction", "A_b_log"),
    ],
)
@torch.no_grad()
def test_freed_memory_is_named(name, as_it_is, copied):
    for dtype, said in ((torch.float32, as_it_is), (torch.bfloat16, copied)):
        made, inputs = _block(dtype, bias=True), _inputs(dtype=dtype)
        made(*inputs)
        made.get_parameter(name).untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=rf"(^|\s){said} needs"):
            made(*inputs)


@pytest.mark.parametrize("which", [0, 1], ids=["hidden_states", "residual"])
@torch.no_grad()
def test_freed_memory_of_an_input_is_an_error(which):
    made, inputs = _block(), _inputs()
    made(*inputs)
    inputs[which].untyped_storage().resize_(8)
    with pytest.raises(
        RuntimeError, match=f"{('x', 'residual')[which]} needs .* bytes of memory and its storage has 8"
    ):
        made(*inputs)


@pytest.mark.parametrize("name", WATCHED)
@torch.no_grad()
def test_hooks_on_any_part_fire_and_may_change_its_output(name, calls):
    made, inputs, seen = _block(), _inputs(), []
    before = made(*inputs)[0]
    part = made.get_submodule(name)
    handle = part.register_forward_pre_hook(lambda module, args: seen.append(name))
    made(*inputs)
    assert seen == [name]
    handle.remove()
    part.forward = lambda *args, original=part.forward: [seen.append(name), original(*args)][1]
    made(*inputs)
    assert seen == [name] * 2
    del part.forward
    assert torch.equal(made(*inputs)[0], before)
    assert calls == [True, False, False, True]


@torch.no_grad()
def test_global_hooks_see_every_part(calls):
    made, inputs, seen = _block(), _inputs(), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.add(module))
    try:
        made(*inputs)
    finally:
        handle.remove()
    assert {made.norm, made.mixer, made.mixer.in_proj, made.mixer.out_proj} <= seen
    assert calls == [False]


def _as_buffer(part: nn.Module) -> None:
    bias = part.bias.detach()
    del part.bias
    part.register_buffer("bias", bias)


@pytest.mark.parametrize("name", ["in_proj", "conv1d", "conv1d_b", "out_proj"])
@torch.no_grad()
def test_a_bias_that_is_no_parameter_takes_part(name):
    made, inputs = _block(bias=True), _inputs()
    expected = made(*inputs)[0]
    _as_buffer(made.mixer.get_submodule(name))
    torch.testing.assert_close(made(*inputs)[0], expected)


@pytest.mark.parametrize("kind", [vim.Mamba, RMSNorm, Linear])
@torch.no_grad()
def test_another_forward_of_a_class_is_called(kind, calls, monkeypatch):
    made, inputs, seen, original = _block(), _inputs(), [], kind.forward
    before = made(*inputs)[0]
    monkeypatch.setattr(kind, "forward", lambda module, *args: [seen.append(module), original(module, *args)][1])
    assert torch.equal(made(*inputs)[0], before)
    assert seen
    assert calls == [True, False]


@pytest.mark.parametrize(
    "change",
    [
        lambda made: setattr(made, "norm", vim.layers.LayerNorm(24)),
        lambda made: setattr(made.mixer, "out_proj", nn.Linear(48, 24)),
        lambda made: setattr(made.mixer, "directions", "v1"),
        lambda made: nn.utils.parametrizations.weight_norm(made.mixer.dt_proj),
        lambda made: setattr(made.mixer.x_proj, "bias", nn.Parameter(torch.randn(12))),
        lambda made: _as_buffer(made.mixer.in_proj),
        lambda made: _as_buffer(made.mixer.conv1d_b),
        lambda made: made.mixer.compile(backend="eager"),
        lambda made: setattr(made.mixer.x_proj, "weight", nn.Parameter(torch.randn(24 * 2, 2 + 10).t())),
        lambda made: made.double(),
    ],
    ids=[
        *("layer norm", "another class", "another kind", "parametrised", "bias of x_proj", "bias of in_proj"),
        *("bias of a convolution", "compiled", "strided", "float64"),
    ],
)
@torch.no_grad()
def test_other_blocks_are_left_to_their_modules(change, calls):
    made, (x, residual) = _block(bias=True), _inputs()
    change(made)
    x = x.to(made.mixer.in_proj.weight.dtype)
    _assert_same(made, x, residual)
    assert calls == [False]


@torch.no_grad()
def test_modes_and_switches_are_respected(calls):
    made, inputs = _block(), _inputs()
    with FlopCounterMode(display=False) as counted:
        made(*inputs)
    with FlopCounterMode(display=False) as expected:
        _by_modules(made, *inputs)
    assert counted.get_total_flops() == expected.get_total_flops() > 0
    with default_backend("reference"):
        made(*inputs)
    with fast_linear(False):
        made(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        made(*inputs)
    torch.func.vmap(lambda x: made(x[None])[0])(inputs[0])
    with torch.device("cpu"):  # a function mode
        made(*inputs)
    assert calls == [False] * 6
    with default_backend("native"):
        made(*inputs)
    assert calls[-1]


@torch.no_grad()
def test_bad_sizes_have_the_words_of_the_modules():
    made = _block()
    made(*_inputs())
    with pytest.raises(ValueError, match="weight must be"):
        made(torch.randn(2, 7, 23))
    with pytest.raises(ValueError, match="hidden_states must be"):
        made(torch.randn(7, 24))
    with pytest.raises(ValueError, match="residual must be"):
        made(torch.randn(2, 7, 24), torch.randn(2, 6, 24))


@pytest.mark.parametrize(
    ("name", "sizes", "match"),
    [
        ("norm.weight", (23,), r"weight must be \(dim,\) = \(24,\), got \(23,\)"),
        ("norm.weight", (), r"weight must be \(dim,\) = \(24,\), got \(\)"),
        ("mixer.D", (0,), "forward weights must be for dim = 48"),
        ("mixer.A_b_log", (48, 4), "backward.A_log must be"),
        ("mixer.x_proj.weight", (13, 48), "x_proj must make"),
        ("mixer.in_proj.weight", (94, 24), "forward weights must be for dim = 47"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_weights_of_wrong_sizes_have_the_words_of_the_modules(name, sizes, match, dtype):
    made = _block(dtype)
    part, _, parameter = name.rpartition(".")
    setattr(made.get_submodule(part), parameter, nn.Parameter(torch.zeros(sizes, dtype=dtype)))
    with pytest.raises(ValueError, match=match):
        made(*_inputs(dtype=dtype))


@torch.no_grad()
def test_an_unknown_merge_is_named():
    made = _block()
    made.mixer.merge = "max"
    with pytest.raises(ValueError, match="merge must be one of"):
        made(*_inputs())


@torch.no_grad()
def test_threads_may_share_a_block():
    made, inputs = _block(), _inputs()
    expected, wrong = _by_modules(made, *inputs)[0], []

    def run() -> None:
        with torch.no_grad():
            wrong.extend(1 for _ in range(50) if not torch.equal(made(*inputs)[0], expected))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _model(**settings) -> vim.VisionMamba:
    torch.manual_seed(0)
    return vim.VisionMamba(img_size=32, embed_dim=24, depth=4, d_state=5, num_classes=4, **settings).eval()


@pytest.mark.parametrize("settings", [{}, {"pairwise_layers": True}, {"rotary": "hidden"}], ids=str)
@torch.no_grad()
def test_a_model_makes_all_blocks_ready_before_the_first_one_runs(settings, calls, monkeypatch):
    model, images = _model(**settings), torch.randn(2, 3, 32, 32)
    called = []
    monkeypatch.setattr(Block, "__call__", lambda block, *args: [called.append(block), block.forward(*args)][1])
    logits = model(images)
    assert calls == [True] * 4
    assert len(called) == (4 if settings else 0), "plain models do without the blocks' own calls"
    called.clear()
    model.layers[2].register_forward_hook(lambda *_: None)
    assert torch.equal(model(images), logits)
    assert len(called) == 4


@pytest.mark.parametrize("settings", [{}, {"norm": True}, {"stop_early": True}], ids=str)
@pytest.mark.parametrize("indices", [[0], [1, 2], [3], 4, None], ids=str)
@torch.no_grad()
def test_intermediates_of_blocks_in_few_calls(indices, settings, calls):
    model, images = _model(), torch.randn(2, 3, 32, 32)
    final, maps = model.forward_intermediates(images, indices, **settings)
    assert all(calls)
    model.layers[0].register_forward_hook(lambda *_: None)
    expected_final, expected = model.forward_intermediates(images, indices, **settings)
    assert torch.equal(final, expected_final)
    assert len(maps) == len(expected) > 0
    assert all(map(torch.equal, maps, expected))


@pytest.mark.parametrize(
    "name", ["layers.1", "layers.1.drop_path", "layers.2.mixer", "layers.3.norm", "layers.2.mixer.x_proj"]
)
@torch.no_grad()
def test_hooks_anywhere_in_a_model_fire_and_may_change_later_weights(name, calls):
    model, images, seen = _model(drop_path_rate=0.1), torch.randn(2, 3, 32, 32), []
    before = model(images)

    def double_the_last_projection(*_: object) -> None:
        seen.append(name)
        model.layers[3].mixer.out_proj.weight.mul_(2)

    handle = model.get_submodule(name).register_forward_hook(double_the_last_projection)
    changed = model(images)
    handle.remove()
    assert seen == [name]
    assert not torch.allclose(changed, before)
    assert torch.equal(model(images), changed), "the weight was changed before it was used"


@torch.no_grad()
def test_blocks_of_other_kinds_are_called(calls, monkeypatch):
    class Louder(Block):
        def forward(self, hidden_states, residual=None):
            hidden_states, residual = super().forward(hidden_states, residual)
            return 2 * hidden_states, residual

    images, quiet, loud, patched = torch.randn(2, 3, 32, 32), _model(), _model(), _model()
    loud.layers[1].__class__ = Louder
    patched.layers[1].forward = Louder.forward.__get__(loud.layers[1])
    expected = quiet(images)
    assert not torch.allclose(loud(images), expected)
    assert torch.equal(patched(images), loud(images))
    training = _model(drop_path_rate=0.9)
    training.layers[3].drop_path.train()
    assert not torch.allclose(training(images), expected), "stochastic depth acts in training"
    original = Block.forward
    monkeypatch.setattr(Block, "forward", lambda block, *args: [2 * t for t in original(block, *args)])
    assert not torch.allclose(quiet(images), expected)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_fewer_blocks_than_the_model_says_are_an_error(grad):
    model = _model()
    model.layers = model.layers[:3]
    with torch.set_grad_enabled(grad), pytest.raises(IndexError, match="3 is out of range"):
        model(torch.randn(1, 3, 32, 32))


@torch.no_grad()
def test_weights_that_change_between_two_calls_of_a_model(calls):
    model, images = _model(), torch.randn(2, 3, 32, 32)
    before = model(images)
    for change in (lambda t: t.mul_(1.5), lambda t: t.data.mul_(1.5)):
        for layer in model.layers:
            change(layer.mixer.in_proj.weight)
        after = model(images)
        assert not torch.allclose(after, before)
        handle = model.layers[0].mixer.register_forward_hook(lambda *_: None)
        assert torch.equal(model(images), after)
        handle.remove()
        before = after
