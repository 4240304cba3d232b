"""Products of our own and of oneDNN: the same numbers, never out of date, plain where graphs are recorded."""

from __future__ import annotations

import copy
import pickle
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import assert_close
from vim.layers.convolution import Conv2d
from vim.layers.linear import Linear
from vim.ops import _packed_weights, fast_linear, linear

module = sys.modules["vim.ops.linear"]


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Names of the products that were not PyTorch's default; fails where this machine's PyTorch has none."""
    assert module.default_linear_reason() is None, module.default_linear_reason()
    seen: list[str] = []

    def count(name):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: [seen.append(name), original(*args)][1])

    count("_onednn_linear")
    count("_packed_linear")
    return seen


@pytest.mark.parametrize("shape", [(197, 192), (2, 17, 192), (1, 192), (192,), (2, 3, 5, 192)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("onednn", [True, False])
def test_values_and_gradients(shape, bias, onednn, calls, monkeypatch):
    monkeypatch.setattr(module, "onednn_is_faster", lambda: onednn)
    torch.manual_seed(0)
    layer, x = Linear(192, 44, bias=bias), torch.randn(shape, requires_grad=True)
    leaves = [x, *layer.parameters()]
    with torch.no_grad():
        assert_close(layer(x), F.linear(x, layer.weight, layer.bias), 1e-6)
    assert calls == ["_packed_linear"]
    actual, expected = layer(x), F.linear(x, layer.weight, layer.bias)
    assert_close(actual, expected, 1e-6)
    for got, wanted in zip(
        torch.autograd.grad(actual.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        assert_close(got, wanted, 1e-5)
    assert calls[1:] == ["_onednn_linear"] * (3 if onednn else 0), "one product forward, two backward"


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_strided_input(grad, calls):
    torch.manual_seed(0)
    layer = Linear(16, 8)
    inputs = (
        torch.randn(4, 6, 32)[..., ::2],
        torch.randn(4, 16, 6).mT,
        torch.randn(6, 1, 16).expand(6, 3, 16),
        torch.randn(3, 9, 16)[:, 2:7:2],
        torch.randn(1, 3000, 16).transpose(0, 1),  # contiguous, though an axis of size 1 has a stride of 48000
        torch.randn(32)[::2],
    )
    with torch.set_grad_enabled(grad):
        for x in inputs:
            assert_close(layer(x), F.linear(x, layer.weight, layer.bias), 1e-6)
    assert grad or calls == ["_packed_linear"] * len(inputs)


@pytest.mark.parametrize("onednn", [True, False])
def test_gradients_for_several_gradients_at_once(onednn, monkeypatch):
    monkeypatch.setattr(module, "onednn_is_faster", lambda: onednn)
    torch.manual_seed(0)
    leaves = [t.requires_grad_() for t in (torch.randn(2, 5, 16), torch.randn(8, 16), torch.randn(8))]
    dy = torch.randn(3, 2, 5, 8)
    got = torch.autograd.grad(linear(*leaves), leaves, dy, is_grads_batched=True)
    wanted = torch.autograd.grad(F.linear(*leaves), leaves, dy, is_grads_batched=True)
    for a, b in zip(got, wanted, strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_other_operands_are_left_to_pytorch(grad, calls):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 16), torch.randn(8, 16, requires_grad=grad), torch.randn(8)
    for other in (weight.to_sparse_csr(), weight[0].detach()):
        assert_close(linear(x, other), F.linear(x, other), 1e-6)
    assert_close(linear(x, weight, bias[:1]), F.linear(x, weight, bias[:1]), 1e-6)
    for operands, match in (
        ((x[:, 1:], weight, bias), r"\(5x15 and 16x8\)"),
        ((x, weight, bias[1:]), "must match the existing size"),
        ((x, weight, bias.double()), "must have the same dtype"),
        ((x[0, 0], weight), "at least 1D"),
    ):
        with pytest.raises(RuntimeError, match=match):
            linear(*operands)
    assert not calls


def _change_by_optimizer(layer: Linear) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(torch.ones(3, 16)).sum().backward()
    optimizer.step()


def _change_by_loading(layer: Linear) -> None:
    layer.load_state_dict({name: torch.randn_like(t) for name, t in layer.state_dict().items()})


def _change_behind_the_version_counter(layer: Linear) -> None:
    layer.weight.data.mul_(2)


@pytest.mark.parametrize("change", [_change_by_optimizer, _change_by_loading, _change_behind_the_version_counter])
@torch.no_grad()
def test_changed_weights_are_used_at_once(change, calls):
    torch.manual_seed(0)
    layer, x = Linear(16, 8), torch.randn(5, 16)
    before = layer(x)
    with torch.enable_grad():
        change(layer)
    assert not torch.allclose(layer(x), before)
    assert_close(layer(x), F.linear(x, layer.weight, layer.bias), 1e-6)


@torch.no_grad()
def test_copies_are_independent(calls):
    torch.manual_seed(0)
    layer, x = Linear(16, 8), torch.randn(5, 16)
    layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), Linear(16, 8)):
        other.weight.zero_()
        other.bias.zero_()
        assert torch.count_nonzero(other(x)) == 0
        assert torch.count_nonzero(layer(x)) > 0
    assert layer.to(torch.float64)(x.double()).dtype == torch.float64
    assert_close(layer.to(torch.float32)(x), F.linear(x, layer.weight, layer.bias), 1e-6)


@pytest.mark.parametrize("change", [_change_by_loading, _change_behind_the_version_counter])
@pytest.mark.parametrize("features", [(16, 8), (7, 5), (1, 3), (2, 1)])
@torch.no_grad()
def test_packed_bfloat16_weights(features, change, calls):
    torch.manual_seed(0)
    layer, x = Linear(*features).bfloat16(), torch.randn(5, features[0]).bfloat16()
    for _ in range(2):
        assert_close(layer(x), F.linear(x, layer.weight, layer.bias), 1e-2)
        change(layer)
    assert_close(layer(x), F.linear(x, layer.weight, layer.bias), 1e-2)
    assert calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("onednn", [True, False])
def test_half_precision_without_instructions_for_it(onednn, dtype, monkeypatch, calls):
    """Such products go through float32, rounded once, and fast: PyTorch's own are 10 times slower there."""
    monkeypatch.setattr(module, "onednn_is_faster", lambda: onednn)
    seen, original = [], F.linear
    for name in ("vim.ops.linear", "vim.ops._packed_weights"):
        monkeypatch.setattr(sys.modules[name], "multiplies_in", lambda dtype: dtype is torch.float32)
    torch.manual_seed(0)
    layer, x = Linear(48, 24).to(dtype), torch.randn(5, 48).to(dtype).requires_grad_()
    leaves = [x, *layer.parameters()]
    exact = [t.detach().float().requires_grad_() for t in leaves]
    wanted = torch.autograd.grad(F.linear(*exact).square().sum(), exact)
    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", lambda x, *args: seen.append(x.dtype) or original(x, *args))
        got = torch.autograd.grad(layer(x).square().sum(), leaves)
    assert (seen, calls) == (([], ["_onednn_linear"] * 3) if onednn else ([torch.float32], []))
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype is dtype
        assert_close(a.float(), b, 1e-2)
    with torch.no_grad():
        once_rounded = F.linear(*exact).to(dtype)
        assert_close(layer(x).float(), once_rounded.float(), 2 * torch.finfo(dtype).eps)
    assert calls[-1] == "_packed_linear"


def test_convolution_without_instructions_for_half_precision(monkeypatch, calls):
    monkeypatch.setattr(module, "multiplies_in", lambda dtype: dtype is torch.float32)
    seen, original = [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, *args: seen.append(x.dtype) or original(x, *args))
    layer, x = Conv2d(3, 8, 4, 4).bfloat16(), torch.randn(2, 3, 8, 8).bfloat16()
    out = layer(x)
    assert seen == [torch.float32]
    assert out.dtype is torch.bfloat16
    assert_close(out.float(), original(x.float(), layer.weight.float(), layer.bias.float(), 4), 1e-2)
    out.sum().backward()
    assert layer.weight.grad.dtype is torch.bfloat16


def test_a_merged_adapter_is_seen(calls):
    """What peft does when it merges: it adds to `.data` in place, which no version counts."""
    torch.manual_seed(0)
    layer, x = Linear(16, 8), torch.randn(5, 16)
    with torch.no_grad():
        before = layer(x)
        layer.weight.data += torch.randn(8, 2) @ torch.randn(2, 16)
        assert_close(layer(x), F.linear(x, layer.weight, layer.bias), 1e-6)
        assert not torch.allclose(layer(x), before)


@torch.no_grad()
def test_fewer_rows_in_the_same_memory_are_seen(calls):
    layer, x = Linear(16, 8, bias=False), torch.randn(5, 16)
    layer(x)
    layer.weight.data = layer.weight.data[:6]
    assert_close(layer(x), F.linear(x, layer.weight), 1e-6)


def _let_go(layer: Linear) -> None:
    layer.weight = None


def _put_other_memory(layer: Linear) -> None:
    layer.weight.data = torch.randn(8, 16)


@pytest.mark.parametrize("change", [_let_go, _put_other_memory])
@torch.no_grad()
def test_packed_weights_go_with_their_memory(change, calls):
    layer = Linear(16, 8)
    layer(torch.randn(5, 16))
    place = _packed_weights._place(layer.weight)
    assert place in _packed_weights._entries, "the native library packs weights; is it built?"
    change(layer)
    assert place not in _packed_weights._entries


@torch.no_grad()
def test_weights_that_share_their_memory(monkeypatch):
    """Slices of one storage, and aliases of one weight: each packed once."""
    packed, original = [], _packed_weights._pack
    monkeypatch.setattr(_packed_weights, "_pack", lambda weight: [packed.append(1), original(weight)][1])
    torch.manual_seed(0)
    together, x = torch.randn(3, 8, 16), torch.randn(5, 16)
    for _ in range(2):
        for i in range(3):
            assert_close(linear(x, together[i]), F.linear(x, together[i]), 1e-6)
            assert_close(linear(x, nn.Parameter(together[i])), F.linear(x, together[i]), 1e-6)
    assert len(packed) == 3
    assert_close(linear(x, together[0, :5]), F.linear(x, together[0, :5]), 1e-6)
    together[1].mul_(2)
    assert_close(linear(x, together[1]), F.linear(x, together[1]), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_swapped_weights(dtype, calls):
    """What torchao does, and PyTorch itself for conversions if asked; it allows no weak reference to a weight."""
    torch.manual_seed(0)
    layers, x = [Linear(16, 8).to(dtype) for _ in range(2)], torch.randn(5, 16).to(dtype)
    before = [layer(x) for layer in layers]
    for name in ("weight", "bias"):
        torch.utils.swap_tensors(getattr(layers[0], name), getattr(layers[1], name))
    assert all(map(torch.equal, (layer(x) for layer in layers), reversed(before)))
    layers[1].weight.mul_(2)
    assert torch.equal(layers[0](x), before[1])
    assert_close(layers[1](x), F.linear(x, layers[1].weight, layers[1].bias), 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("held", [0, 30])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_freed_memory_is_an_error(grad, held, dtype, calls):
    torch.manual_seed(0)
    made = {"x": torch.randn(5, 16, dtype=dtype), "weight": torch.randn(8, 16, dtype=dtype)}
    made["bias"] = torch.randn(8, dtype=dtype)
    with torch.set_grad_enabled(grad):
        for name, t in made.items():
            leaves = {n: other.clone().requires_grad_(grad) for n, other in made.items()}
            expected = linear(**leaves)
            memory = leaves[name].untyped_storage()
            memory.resize_(held if held < memory.nbytes() else held // 2)
            with pytest.raises(RuntimeError, match=rf"{name} needs {t.nbytes} bytes of memory and its storage has"):
                linear(**leaves)
            memory.resize_(t.nbytes)
            leaves[name].data.copy_(t)
            assert torch.equal(linear(**leaves), expected)
            leaves[name].data.mul_(2)
            others = {n: leaf.detach() for n, leaf in leaves.items()}
            assert_close(linear(**leaves), F.linear(others["x"], others["weight"], others["bias"]), 1e-2)


def test_two_threads_with_two_models(calls):
    torch.manual_seed(0)
    layers, x, failures = [Linear(64, 32) for _ in range(2)], torch.randn(40, 64), []
    expected = [F.linear(x, layer.weight, layer.bias) for layer in layers]

    def work(i: int) -> None:
        for _ in range(50):
            with torch.no_grad():
                if not torch.allclose(layers[i](x), expected[i], atol=1e-5):
                    failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1) for _ in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_recorded_graphs_and_other_dtypes_keep_plain_ops(calls):
    layer, x = Linear(16, 8), torch.randn(5, 16)
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    exported = torch.export.export(layer, (x,))
    assert "mkldnn" not in str(exported.graph)
    torch.func.grad(lambda t: layer(t).sum())(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    copy.deepcopy(layer).double()(x.double())
    layer(torch.zeros(0, 16))
    assert not calls


def test_both_switches(calls):
    x, weight = torch.randn(5, 16), torch.randn(8, 16)
    with torch.backends.mkldnn.flags(enabled=False):
        linear(x, weight)
        assert "enabled is False" in module.default_linear_reason()
    with fast_linear(False):
        linear(x, weight)
        assert "VIM_FAST_LINEAR=0" in module.default_linear_reason()
    assert not calls
    linear(x, weight)
    assert calls


def test_flops():
    layer, x = Linear(16, 8), torch.randn(5, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 5 * 16 * 8
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    assert counter.get_total_flops() == 2 * 5 * 16 * 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 24), (2, 17, 24)], ids=str)
def test_rows_at_multiples_of_16_bytes(shape, bias, dtype):
    """What runs on a GPU, here on the CPU: the same numbers in rows of 48, forward and backward."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    weight = torch.randn(44, 24, dtype=dtype, requires_grad=True)
    offset = torch.randn(44, dtype=dtype, requires_grad=True) if bias else None
    actual, expected = module._AlignedLinear.apply(x, weight, offset, 48), F.linear(x, weight, offset)
    assert actual.stride()[-2:] == (48, 1)
    assert actual.data_ptr() % 16 == 0
    assert_close(actual, expected, 1e-2)
    leaves = [t for t in (x, weight, offset) if t is not None]
    cotangent = torch.randn_like(expected)
    for got, wanted in zip(
        torch.autograd.grad(actual, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent), strict=True
    ):
        assert got.dtype == dtype
        assert_close(got, wanted, 2e-2)


@pytest.mark.parametrize(
    ("columns", "dtype", "row"),
    [(44, torch.bfloat16, 48), (48, torch.bfloat16, 48), (44, torch.float32, 44), (5, torch.float16, 8)],
)
def test_rows_of_results_on_a_gpu(columns, dtype, row):
    """Decided by the device alone, so a tensor that only pretends to be on a GPU shows it."""
    with FakeTensorMode():
        x, weight = (
            torch.randn(2, 7, 24, device="cuda", dtype=dtype),
            torch.randn(columns, 24, device="cuda", dtype=dtype),
        )
        y = linear(x, weight)
        assert (y.shape, y.stride(), y.dtype) == ((2, 7, columns), (7 * row, row, 1), dtype)
        assert linear(x[0, 0], weight).shape == (columns,)
