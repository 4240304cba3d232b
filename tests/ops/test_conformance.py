"""Every backend against the reference on the same cases: values, gradients, strides, dtypes, sizes, determinism.

In a process with TRITON_INTERPRET=1, which `test_triton.py` starts, the backend is Triton alone, in its interpreter.
"""

from __future__ import annotations

import contextlib
import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import emulated
from tests.helpers import golden_names, make_bidirectional_inputs, make_scan_inputs
from tests.ops import conformance, interpreted, stand_ins
from tests.ops.conformance import FLOATS, PlainTarget, Target, detached, everything, noise
from tests.ops.natives import REASON

HALF = {"dtype": (torch.bfloat16, torch.float16)}
NATIVE = Target("native", "", {})
REFERENCE = Target("reference", "_reference", {})
# Emulated threads take long for long sequences. What a warp takes in a row: 256, 512 or 1024 numbers, four at a time;
# 1056 are read twice and 33 one at a time. A block has 64 channels; a convolution pieces of 8 tokens.
EMULATED = Target(
    "emulated",
    emulated.SUFFIX,
    {
        "bidirectional_scan": {
            "length": (1, 2, 63, 65, 130),
            "widths": ((1, 1, 1), (5, 3, 12), (64, 16, 12), (24, 17, 5), (40, 16, 24), (8, 33, 48)),
        },
        "selective_scan": {"length": (1, 37, 65)},
        "segmented_scan": {"length": (1, 37, 65)},
        "segmented_conv1d": {"length": (1, 7, 9, 19), "dim": (5, 8, 34)},
        "bidirectional_conv1d": {"length": (1, 7, 9, 37), "dim": (4, 5, 12, 68, 130)},
        "causal_conv1d": {"length": (1, 7, 9, 19), "dim": (5, 8, 68)},
        "add_rms_norm": {
            "shape": ((1, 1), (5, 24), (3, 3, 192), (9, 384), (2, 768), (3, 1056), (40, 33), (70, 8)),
        },
    },
)
# A program and token take the interpreter some 10 ms forward and 40 backward.
TRITON = Target(
    "triton",
    "_triton",
    {
        "bidirectional_scan": {
            "length": (1, 6, 13),
            "widths": ((8, 16, 4), (20, 5, 3), (1, 1, 1)),
            "every": (5, 1, 64, 0),
        },
        "selective_scan": {"length": (1, 6), "widths": ((12, 3),), "every": (4, 1, 64, 0)},
        "segmented_scan": {"length": (1, 6), "widths": ((12, 3),), "every": (4, 1, 64, 0), "mean": (3, 1, None)},
        "segmented_conv1d": {"length": (1, 5, 19), "dim": (5, 33), "width": (4, 1, 3), "start": (None, 5)},
        "bidirectional_conv1d": {
            "length": (1, 5, 19),
            "dim": (5, 33),
            "widths": ((4, 4), (1, 7), (3, 4)),
            "start": (None, 5),
        },
        "causal_conv1d": {"length": (1, 5, 19), "dim": (5, 33), "width": (4, 1, 3), "start": (None, 5)},
        "add_rms_norm": {"shape": ((1,), (3, 7), (2, 5, 48)), "layout": ("contiguous", "part", "transposed")},
    },
)
# The packages' kernels take widths from 2 to 4, and round steps and each direction's result where the inputs are half.
MAMBA_SSM = PlainTarget(
    "mamba_ssm",
    "",
    {
        "bidirectional_scan": {"length": (1, 19), "widths": ((6, 4, 3),), "every": (0,), "dtype": (torch.float32,)},
        "selective_scan": {"length": (1, 9), "widths": ((6, 3),), "every": (0,)},
        "bidirectional_conv1d": {"length": (1, 19), "dim": (6,), "widths": ((4, 3), (2, 4)), "start": (None, 5)},
        "causal_conv1d": {"length": (1, 19), "dim": (6,), "width": (2, 3, 4), "start": (None, 5)},
        "add_rms_norm": {"shape": ((3, 7), (2, 5, 48)), "half_weight": (False,), "grads": ((True, True),)},
    },
    missing=("segmented_scan", "segmented_conv1d"),
)

if not interpreted.INTERPRETED:
    LIBRARY = ctypes.CDLL(str(emulated.load()))
KERNELS = [TRITON] if interpreted.INTERPRETED else [NATIVE, EMULATED]
TARGETS = KERNELS if interpreted.INTERPRETED else [*KERNELS, MAMBA_SSM]
by_kernels = pytest.mark.parametrize("target", KERNELS, ids=lambda target: target.name)
by_family = pytest.mark.parametrize("target", [*KERNELS, REFERENCE], ids=lambda target: target.name)
without_interpreter = pytest.mark.skipif(interpreted.INTERPRETED, reason="too long for the interpreter")


@pytest.fixture(autouse=True)
def _surroundings(request, monkeypatch):
    """What a backend needs: kernels that were built, packages in whose place others stand, narrow blocks."""
    target = getattr(request.node, "callspec", None) and request.node.callspec.params.get("target")
    if target is NATIVE and REASON is not None:
        pytest.skip(f"no native kernels: {REASON}")
    if target is TRITON:
        interpreted.set_lanes(monkeypatch, 8)
    with stand_ins.installed() if target is MAMBA_SSM else contextlib.nullcontext():
        yield


@pytest.mark.parametrize(("target", "op", "case"), list(conformance.parameters(TARGETS)))
def test_case(target, op, case):
    conformance.OPS[op](target.check, **case)


@by_kernels
def test_empty(target):
    if target is TRITON:  # an op that is called with tokens, as the public functions demand
        conformance.check_empty(target, [(0, 5)])
    else:
        conformance.check_empty(target)


@without_interpreter
@by_kernels
def test_extreme_inputs_stay_right(target):
    conformance.check_extremes(target)


@without_interpreter
@by_kernels
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_sizes(target, data):
    def number(least: int, most: int) -> int:
        return data.draw(st.integers(least, most))

    dtype, length, dim = data.draw(st.sampled_from(FLOATS)), number(1, 70), number(1, 40)
    states, rank, every, seed = number(1, 20), number(1, 20), number(1, 90), number(0, 99)
    tensors = detached(make_bidirectional_inputs(number(1, 3), length, dim, states, rank, dtype, seed))
    _, entry = target.check("bidirectional_scan", *tensors, 0.5, every)
    target.check("bidirectional_scan_backward", tensors[12], *tensors, entry, 0.5, every)
    tensors = detached(make_scan_inputs(number(1, 3), dim, length, states, dtype, seed).values())
    flags = (True, data.draw(st.booleans()), every)
    out, state, entry = target.check("selective_scan", *tensors, *flags)
    target.check("selective_scan_backward", out, noise(*state.shape), *tensors, entry, *flags)
    dim = max(dim, 3)  # of one or two channels a sum over tokens may cancel
    widths, start = (number(1, 6), number(1, 6)), data.draw(st.sampled_from((None, 1, 4)))
    conformance.both_convolutions(target.check, length, dim, widths, (True, True), dtype, start, False)
    conformance.norm(target.check, (length, dim), dtype, False, "plain", "part", (True, True))


def _sizes(target: Target) -> tuple[int, int, int, int, int]:
    return {"native": (2, 197, 96, 16, 12), "emulated": (2, 75, 72, 16, 12), "triton": (1, 5, 20, 5, 3)}[target.name]


@by_kernels
def test_every_output_is_written(target):
    conformance.check_every_output_is_written(lambda: everything(target.suffix, _sizes(target), torch.float32))


@without_interpreter
@by_family
@pytest.mark.parametrize("dtype", FLOATS)
def test_same_bits_under_autocast(target, dtype):
    """`loss.backward()` within the region: the products of the backward pass stay in float32."""
    plain = everything(target.suffix, (2, 33, 24, 16, 12), dtype)
    with torch.autocast("cpu", torch.bfloat16):
        conformance.assert_same_bits(plain, everything(target.suffix, (2, 33, 24, 16, 12), dtype))


@without_interpreter
@pytest.mark.parametrize("target", [NATIVE], ids=["native"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("batch", [1, 3])
def test_same_bits_for_any_number_of_threads(target, batch, dtype):
    results = conformance.by_threads(lambda: everything("", (batch, 197, 96, 16, 12), dtype), (1, 2, 3, 1))
    for other in results[1:]:
        conformance.assert_same_bits(results[0], other)


@without_interpreter
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sizes", [(2, 75, 72, 16, 12), (2, 9, 36, 5, 3)], ids=str)
def test_same_bits_in_every_order_of_threads(sizes, dtype):
    """Without a barrier that is needed, what emulated threads compute depends on their order."""
    results = []
    try:
        for order in range(5):  # threads in turns, ascending, descending and mixed; warps one by one, from either end
            LIBRARY.vim_emulation_order(order)
            results.append(everything(EMULATED.suffix, sizes, dtype))
    finally:
        LIBRARY.vim_emulation_order(0)
    for other in results[1:]:
        conformance.assert_same_bits(results[0], other)


@by_kernels
def test_float64_reaches_the_reference(target):
    tensors = detached(make_bidirectional_inputs(2, 9, 5, 3, 2, torch.float64))
    target.check("bidirectional_scan", *tensors, 0.5, 4)
    x, weight, bias = noise(2, 9, 5).double(), noise(5, 4).double(), noise(5).double()
    target.check("bidirectional_conv1d", x, weight, bias, weight, None)
    target.check("add_rms_norm", x, None, bias, 1e-5)


@without_interpreter
@by_kernels
def test_wrong_sizes_raise_instead_of_reading_beyond(target):
    tensors = detached(make_bidirectional_inputs(2, 9, 5, 3, 2))
    for i in range(13):
        wrong = [t[..., :-1] if j == i else t for j, t in enumerate(tensors)]
        with pytest.raises(RuntimeError, match="does not have the sizes"):
            conformance.run_op(f"bidirectional_scan{target.suffix}", *wrong, 0.5, 0)


@by_family
@pytest.mark.parametrize("op", list(conformance.OPS))
def test_registration(op, target):
    """Schema, fakes and autograd hold."""

    def leaf(*shape: int) -> torch.Tensor:
        return noise(*shape).requires_grad_()

    indices = torch.tensor([[0, 0, 1, 1, 0], [3, 2, 2, 2, 2]], dtype=torch.int32)
    calls = {
        "bidirectional_scan": [(*make_bidirectional_inputs(1, 3, 3, 2, 2), 0.5, every) for every in (0, 2)],
        "selective_scan": [(*make_scan_inputs(1, 4, 3, 2).values(), True, False, every) for every in (0, 2)],
        "segmented_scan": [
            (*make_scan_inputs(1, 4, 3, 2).values(), initial, seq_idx, True, True, every)
            for initial, seq_idx, every in (
                (leaf(1, 4, 2), None, 2),
                (None, indices[:1, :3], 2),
                (leaf(1, 4, 2), None, 0),
            )
        ],
        "segmented_conv1d": [
            (leaf(2, 3, 5), leaf(3, 4), None, indices, True, True),
            (noise(2, 5, 3).mT.requires_grad_(), leaf(3, 4), leaf(3), indices, False, False),
        ],
        "bidirectional_conv1d": [(leaf(2, 5, 3), leaf(3, 4), leaf(3), leaf(3, 4), None)],
        "causal_conv1d": [
            (leaf(2, 3, 5), leaf(3, 4), None, True, True),
            (noise(2, 5, 3).mT.requires_grad_(), leaf(3, 4), leaf(3), False, False),
        ],
        "add_rms_norm": [(leaf(2, 5, 3), residual, leaf(3), 1e-5) for residual in (leaf(2, 5, 3), None)],
    }
    for arguments in calls[op]:
        torch.library.opcheck(getattr(torch.ops.vim, op + target.suffix).default, arguments)


@pytest.mark.parametrize("target", [TRITON] if interpreted.INTERPRETED else [MAMBA_SSM], ids=lambda target: target.name)
@pytest.mark.parametrize("case", interpreted.MIXERS if interpreted.INTERPRETED else golden_names("mixer"))
def test_golden_mixer(case, target, monkeypatch):
    if target is TRITON:
        interpreted.set_lanes(monkeypatch, 64)  # fewer programs
    conformance.check_golden_mixer(case, target.name)
