"""Memory taken from under a tensor, as sharding and offloading do: an error that names it, never a crash.

Without the checks, most of these tests end the process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.helpers import make_bidirectional_inputs, make_scan_inputs
from tests.ops.conformance import noise
from tests.ops.natives import needs_native
from vim.ops import (
    ScanOperands,
    add_rms_norm,
    available_backends,
    bidirectional_conv1d,
    bidirectional_scan,
    causal_conv1d,
    selective_scan,
)

pytestmark = needs_native


def _arguments() -> dict[str, tuple[Any, ...]]:
    scan = [t.detach() for t in make_bidirectional_inputs(2, 9, 5, 3, 2)]
    selective = [None if t is None else t.detach() for t in make_scan_inputs(2, 5, 9, 3).values()]
    x, weights = noise(2, 9, 5), (noise(5, 4), noise(5), noise(5, 4), noise(5))
    channel_first = x.mT.contiguous()
    _, last_state, entry = torch.ops.vim.selective_scan(*selective, True, True, 4)
    segments = (noise(2, 5, 3), (torch.arange(18) // 4).int().view(2, 9))
    entries = torch.ops.vim.bidirectional_scan(*scan, 0.5, 4)[1]
    return {
        "bidirectional_scan": (*scan, 0.5, 4),
        "bidirectional_scan_backward": (x, *scan, entries, 0.5, 4),
        "selective_scan": (*selective, True, True, 4),
        "selective_scan_backward": (channel_first, last_state, *selective, entry, True, True, 4),
        "segmented_scan": (*selective, *segments, True, True, 4),
        "segmented_scan_backward": (channel_first, last_state, *selective, *segments, entry, True, True, 4),
        "segmented_conv1d": (channel_first, *weights[:2], segments[1], True, False),
        "segmented_conv1d_backward": (channel_first, channel_first + 1, *weights[:2], segments[1], True, False),
        "bidirectional_conv1d": (x, *weights),
        "bidirectional_conv1d_backward": (x.clone(), x + 1, x, *weights),
        "causal_conv1d": (channel_first, *weights[:2], True, False),
        "causal_conv1d_backward": (channel_first, channel_first + 1, *weights[:2], True, False),
        "add_rms_norm": (x, noise(2, 9, 5), weights[1], 1e-5),
        "add_rms_norm_backward": (x, noise(2, 9, 5), noise(2, 9, 5), weights[1], 1e-5),
    }


def _as_kernels_say(name: str) -> str:
    of_backward = name == "A_b_log" or name.endswith("_b")
    return f"{name.replace('A_b', 'A').removesuffix('_b')} of the backward direction" if of_backward else name


@pytest.mark.parametrize("family", ["", "_reference"])
@pytest.mark.parametrize("op", _arguments())
def test_every_argument_of_every_op(op, family):
    run = getattr(torch.ops.vim, op + family).default
    names = [argument.name for argument in run._schema.arguments]
    for i, t in enumerate(_arguments()[op]):
        for held in (0, 4) if isinstance(t, torch.Tensor) else ():
            arguments = _arguments()[op]
            arguments[i].untyped_storage().resize_(held)
            said = f"({names[i]}|{_as_kernels_say(names[i])})"
            with pytest.raises(RuntimeError, match=rf"(^|\s){said} needs {t.nbytes} bytes .* has {held}: it was freed"):
                run(*arguments)


def test_arguments_of_products():
    for i, name in enumerate("abc"):
        operands = [noise(5, 16), noise(16, 8), noise(5, 8)]
        torch.ops.vim.product_(*operands[:2], None, False, operands[2])
        operands[i].untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=rf"{name} needs .* has 0: it was freed"):
            torch.ops.vim.product_(*operands[:2], None, False, operands[2])


def test_strides_reach_further_than_sizes():
    x, weight = noise(2, 9, 8)[..., 2:7], noise(5, 4)
    torch.ops.vim.bidirectional_conv1d(x, weight, None, weight, None)
    x.untyped_storage().resize_(x.nbytes)
    for family in ("", "_reference"):
        run = getattr(torch.ops.vim, "bidirectional_conv1d" + family)
        with pytest.raises(
            RuntimeError, match=rf"x needs {(2 * 9 * 8 - 1) * 4} bytes of memory and its storage has 360"
        ):
            run(x, weight, None, weight, None)


def test_nothing_needs_no_memory():
    x, weight = noise(0, 9, 5), noise(5, 4)
    x.untyped_storage().resize_(0)
    assert torch.ops.vim.bidirectional_conv1d(x, weight, None, weight, None)[0].shape == x.shape
    assert torch.ops.vim.bidirectional_conv1d_reference(x, weight, None, weight, None)[0].shape == x.shape


def _scan(operands: dict[str, torch.Tensor]) -> Any:
    sides = [
        {n.removeprefix(f"{s}."): t for n, t in operands.items() if n.startswith(s)} for s in ("forward", "backward")
    ]
    return bidirectional_scan(ScanOperands(**sides[0]), ScanOperands(**sides[1]), operands["z"])


_CONVERTING: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], Callable[[], dict[str, torch.Tensor]]]] = {
    "add_rms_norm": (
        lambda o: add_rms_norm(**o),
        lambda: {"x": noise(3, 5), "residual": noise(3, 5), "weight": noise(5)},
    ),
    "bidirectional_conv1d": (
        lambda o: bidirectional_conv1d(**o),
        lambda: {"x": noise(2, 9, 5), **{n: noise(*s) for n, s in _FILTERS.items()}},
    ),
    "causal_conv1d": (
        lambda o: causal_conv1d(**o),
        lambda: {"x": noise(2, 5, 9), "weight": noise(5, 4), "bias": noise(5)},
    ),
    "selective_scan": (lambda o: selective_scan(**o), lambda: dict(make_scan_inputs(2, 5, 9, 3))),
    "bidirectional_scan": (
        _scan,
        lambda: dict(zip(_OPERANDS, make_bidirectional_inputs(2, 9, 5, 3, 2), strict=True)),
    ),
}
_FILTERS = {"weight": (5, 4), "bias": (5,), "weight_b": (5, 4), "bias_b": (5,)}
_OPERANDS = [*(f"{side}.{name}" for side in ("forward", "backward") for name in ScanOperands._fields), "z"]


@pytest.mark.parametrize("op", _CONVERTING)
def test_arguments_that_are_converted_first(op):
    """Weights in half precision beside activations in float32 or in it."""
    assert "native" in available_backends(op)
    run, make = _CONVERTING[op]
    for name in make():
        for held in (0, 2):
            operands = {n: t.detach().bfloat16() for n, t in make().items()}
            run(operands)
            needed = operands[name].nbytes
            operands[name].untyped_storage().resize_(held)
            argument = name.rpartition(".")[2]
            said = f"({name}|{_as_kernels_say(argument)}|{argument}( of the backward direction)?)"
            with pytest.raises(RuntimeError, match=rf"(^|\s){said} needs {needed} bytes .* has {held}: it was freed"):
                run(operands)
