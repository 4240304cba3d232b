"""Patches, class tokens and position embedding in one op: its reference's values and gradients on every backend."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import TOLERANCES, assert_close
from tests.ops.conformance import by_threads
from vim.ops import available_backends, embed_patches

BACKENDS = available_backends("embed_patches")
CASES = {  # batch, height, width, patch, stride, places
    "middle": (2, 32, 40, 8, 8, (10,)),
    "no token": (2, 32, 40, 8, 8, ()),
    "both ends": (3, 32, 40, 8, 8, (0, 21)),
    "overlapping": (1, 24, 20, 8, 4, (0,)),
    "uncovered": (2, 35, 21, 8, 8, (8,)),
    "many": (4, 64, 64, 4, 4, (128,)),
}


def make(
    batch: int, height: int, width: int, patch: int, stride: int, places: tuple[int, ...], dtype: torch.dtype
) -> tuple[list[torch.Tensor | None], dict]:
    """Random arguments as leaves that require gradients, and the settings."""
    rng = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()

    dim, length = 20, ((height - patch) // stride + 1) * ((width - patch) // stride + 1) + len(places)
    tokens = normal(len(places), dim) if places else None
    images, weight = normal(batch, 3, height, width), normal(dim, 3, patch, patch)
    return [images, weight, normal(dim), tokens, normal(length, dim)], {"places": places, "stride": (stride, stride)}


def present(tensors: list[torch.Tensor | None]) -> list[torch.Tensor]:
    return [t for t in tensors if t is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend, case, dtype):
    inputs, settings = make(*case, dtype)
    wide = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    actual, expected = embed_patches(*inputs, **settings, backend=backend), embed_patches(*wide, **settings)
    value, gradient, *_ = TOLERANCES[dtype]
    assert actual.dtype is dtype
    assert_close(actual, expected, value)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    grads = torch.autograd.grad(actual, present(inputs), cotangent.to(dtype))
    for got, wanted in zip(grads, torch.autograd.grad(expected, present(wide), cotangent), strict=True):
        assert_close(got, wanted, gradient)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_absent_terms(backend):
    inputs, settings = make(*CASES["middle"], torch.float32)
    images, weight, _, tokens, _ = (None if t is None else t.detach() for t in inputs)
    expected = embed_patches(images, weight, None, tokens, **settings, backend="reference")
    channels_last = images.contiguous(memory_format=torch.channels_last)
    apart = torch.stack([images, images], -1)[..., 0]
    for other in (images, channels_last, apart):
        assert_close(
            embed_patches(other, weight.mT.contiguous().mT, None, tokens, **settings, backend=backend), expected, 2e-6
        )


def test_numerically():
    inputs, settings = make(1, 6, 6, 3, 3, (2,), torch.float64)

    def run(*tensors):
        return embed_patches(*tensors, **settings)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("family", ["", "_reference"])
def test_opcheck(family):
    inputs, settings = make(*CASES["both ends"], torch.float32)
    arguments = (*inputs, list(settings["places"]), list(settings["stride"]), torch.float32)
    torch.library.opcheck(getattr(torch.ops.vim, f"embed_patches{family}").default, arguments)


def test_the_bits_do_not_depend_on_threads():
    inputs, settings = make(*CASES["many"], torch.float32)
    first, *others = by_threads(lambda: embed_patches(*inputs, **settings))
    assert all(torch.equal(first, other) for other in others)


def test_autocast():
    inputs, settings = make(*CASES["middle"], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        images, weight, bias, *_ = inputs
        assert embed_patches(images, weight, bias, **{**settings, "places": ()}).dtype is torch.bfloat16
        assert embed_patches(*inputs, **settings).dtype is torch.float32
    assert_close(embed_patches(*inputs, **settings), embed_patches(*inputs, **settings, backend="reference"), 2e-6)


def test_compiles_and_counts():
    inputs, settings = make(*CASES["middle"], torch.float32)
    compiled = torch.compile(embed_patches, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs, **settings), embed_patches(*inputs, **settings))
    with FlopCounterMode(display=False) as counter:
        embed_patches(*inputs, **settings)
    assert counter.get_total_flops() == 2 * 2 * 20 * 20 * 3 * 8 * 8


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"images": torch.zeros(3, 32, 40)}, ValueError, r"images must be \(batch, in_chans, height, width\)"),
        ({"images": torch.zeros(2, 3, 7, 40)}, ValueError, "at least as large as a patch"),
        ({"weight": torch.zeros(20, 4, 8, 8)}, ValueError, "weight must be"),
        ({"weight": torch.zeros(20, 3, 8)}, ValueError, "weight must be"),
        ({"bias": torch.zeros(19)}, ValueError, r"bias must be \(embed_dim,\) = \(20,\), got \(19,\)"),
        ({"places": (21,)}, ValueError, r"places must be 1 different numbers below 21"),
        ({"places": ()}, ValueError, "places must be 1"),
        ({"pos_embed": torch.zeros(20, 20)}, ValueError, r"pos_embed must be .* = \(21, 20\), got \(20, 20\)"),
        ({"stride": (0, 8)}, ValueError, "stride must be positive"),
        ({"tokens": torch.zeros(1, 20).int()}, TypeError, "tokens must be float32"),
    ],
)
def test_bad_arguments_are_named(change, error, match):
    inputs, settings = make(*CASES["middle"], torch.float32)
    named = dict(zip(("images", "weight", "bias", "tokens", "pos_embed"), inputs, strict=True))
    with pytest.raises(error, match=match):
        embed_patches(**{**named, **settings, **change})


def test_freed_memory_is_an_error():
    for i in range(5):
        inputs, settings = make(*CASES["middle"], torch.float32)
        inputs[i].detach().untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="freed or cut short"):
            embed_patches(*inputs, **settings)
