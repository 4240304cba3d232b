"""The classifier: its product by the kernels, where nobody could tell, or by the module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import TOLERANCES, assert_close
from vim.layers import head as head_module
from vim.layers.head import classify
from vim.ops import available_backends

pytestmark = pytest.mark.skipif(
    "native" not in available_backends("bidirectional_block"), reason="no native kernels: the head runs by its module"
)


@pytest.fixture
def products(monkeypatch) -> list[torch.Size]:
    """The sizes of the weights that the kernels multiplied by."""
    seen, original = [], head_module.project
    monkeypatch.setattr(head_module, "project", lambda x, w, b: [seen.append(w.shape), original(x, w, b)][1])
    return seen


def make(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(24, 37).to(dtype), torch.randn(3, 24, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_kernels_compute_what_the_module_does(dtype, mode, products):
    head, x = make(dtype)
    with mode():
        found, expected = classify(head, x), head(x)
    assert found.dtype is dtype
    assert_close(found, expected, TOLERANCES[dtype][0])
    assert products == [head.weight.shape]


@torch.no_grad()
def test_a_write_past_pytorch_is_seen(products):
    head, x = make()
    before = classify(head, x)
    head.weight.numpy()[:] *= 2
    assert_close(classify(head, x) - head.bias, 2 * (before - head.bias), 1e-6)
    assert len(products) == 2


def _hooked(head):
    head.register_forward_hook(lambda *_: None)


def _another_class(head):
    head.__class__ = type("LoRA", (nn.Linear,), {"forward": nn.Linear.forward})


def _without_bias(head):
    head.bias = None


@pytest.mark.parametrize("change", [_hooked, _another_class, _without_bias, nn.Linear.double])
@torch.no_grad()
def test_other_heads_are_called(change, products):
    head, x = make()
    change(head)
    x = x.to(head.weight.dtype)
    assert torch.equal(classify(head, x), copy.deepcopy(head)(x))
    assert products == []


def test_with_gradients_under_autocast_and_counted_it_is_called(products):
    head, x = make()
    assert classify(head, x).requires_grad
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        classify(head, x)
    assert counter.get_total_flops() == 2 * 3 * 24 * 37
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert classify(head, x).dtype is torch.bfloat16
    with torch.no_grad():
        each = torch.func.vmap(lambda row: classify(head, row[None])[0])(x)
    assert_close(each, head(x).detach(), 1e-6)
    assert products == []
