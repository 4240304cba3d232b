"""The native CPU kernels against the reference: values, gradients, strides, dtypes, determinism, memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from tests.helpers import make_bidirectional_inputs, make_scan_inputs
from tests.ops import test_product
from tests.ops.kernel_checks import FLOATS, KernelChecks, noise
from vim.ops.backends import native
from vim.ops.backends.registry import Inapplicable
from vim.ops.build import compilation

REASON = native.load()
if REASON is not None and not isinstance(REASON, Inapplicable) and compilation.find_compiler() is not None:
    raise RuntimeError(f"there is a compiler, but there are no native kernels: {REASON}")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no native kernels: {REASON}")

_checks = KernelChecks("")
check = _checks.check
check_bidirectional_scan, check_selective_scan = _checks.bidirectional_scan, _checks.selective_scan


def check_exponential() -> None:
    """Scans of two tokens whose second input is 0 return one decay each."""
    A = torch.linspace(-86, 0, 1723).view(-1, 1)
    u, ones = torch.tensor([1.0, 0.0]).expand(1, 1723, 2), torch.ones(1, 1723, 2)
    B = torch.ones(1, 1, 2)
    decay = torch.ops.vim.selective_scan(u, ones, A, B, B, None, None, None, False, False, 0)[0][0, :, 1]
    expected = A[:, 0].double().exp()
    error = (decay.double() - expected).abs() / expected
    # Two units in the last place, and the rounding of the argument.
    assert (error <= 2.4e-7 + 1.2e-7 * A[:, 0].abs()).all(), error.max()
    assert decay[-1] == 1
    near_zero = torch.linspace(-1e-3, 0, 50).view(-1, 1)
    args = (u[:, :50], ones[:, :50], near_zero, B, B, None, None, None, False, False, 0)
    decay = torch.ops.vim.selective_scan(*args)[0][0, :, 1]
    assert (decay.double() - near_zero[:, 0].double().exp()).abs().max() < 1.5e-7


def check_far_decays() -> None:
    """Steps that leave no state, in some chunks of tokens and some blocks of channels, beside ordinary ones."""
    inputs = {name: t.detach() for name, t in make_scan_inputs(2, 24, 200, 16).items()}
    inputs["delta"][:, 5:12, 70:75] = 300.0
    inputs["delta"][1, 20, 199] = 1e9
    for reverse in (False, True):
        check_selective_scan(inputs, reverse, True, 64)


def check_shapes() -> None:
    """One pass over what the instruction sets could do differently; also run in other processes."""
    check_exponential()
    check_far_decays()
    for check_products in test_product.CHECKS:
        check_products()
    for shape in ((1, 1, 1, 1, 1), (2, 65, 24, 16, 12), (1, 130, 33, 17, 5), (2, 7, 48, 3, 1)):
        for dtype in FLOATS:
            tensors = [t.detach() for t in make_bidirectional_inputs(*shape, dtype=dtype)]
            check_bidirectional_scan(tensors, 64)
            x = noise(shape[0], shape[1], shape[2], dtype=dtype)
            weights = [noise(shape[2], 4), noise(shape[2]), noise(shape[2], 3), noise(shape[2])]
            check("bidirectional_conv1d", x, *weights)
            check("bidirectional_conv1d_backward", x, x.flip(0), x, *weights)
            _, r = check("add_rms_norm", x, noise(*x.shape), weights[1], 1e-5)
            check("add_rms_norm_backward", x, r, r, weights[1], 1e-5)


@pytest.mark.parametrize("capability", ["avx512bf16", "avx512", "avx2", "baseline"])
def test_every_instruction_set(capability):
    code = (
        "from tests.ops.test_native_kernels import check_shapes, native\ncheck_shapes()\nprint(native.capability())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "VIM_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    used = done.stdout.split()[-1]
    if used != capability:
        pytest.skip(f"not on this processor: {capability} kernels are not tested, {used} runs in their place")


def test_exponential():
    check_exponential()


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 197])
@pytest.mark.parametrize(
    ("dim", "d_state", "dt_rank"), [(1, 16, 1), (5, 3, 12), (16, 1, 1), (24, 17, 12), (48, 16, 12)]
)
def test_bidirectional_scan(length, dim, d_state, dt_rank):
    tensors = [t.detach() for t in make_bidirectional_inputs(2, length, dim, d_state, dt_rank)]
    check_bidirectional_scan(tensors, 64)


@pytest.mark.parametrize("every", [1, 3, 64, 100, 1000, 2**62, 2**63 - 1])
def test_entry_states_at_any_distance(every):
    check_bidirectional_scan([t.detach() for t in make_bidirectional_inputs(1, 150, 20, 5, 2)], every)
    inputs = {k: v.detach() for k, v in make_scan_inputs(1, 20, 150, 5).items()}
    for reverse in (False, True):
        check_selective_scan(inputs, reverse, True, every)


@pytest.mark.parametrize("dtype", FLOATS)
def test_strides(dtype):
    """Halves of xz, padded rows, transposed and expanded operands."""
    tensors = [t.detach() for t in make_bidirectional_inputs(2, 70, 24, 16, 12, dtype=dtype)]
    xz = noise(2, 70, 48, dtype=dtype)
    padded = torch.cat([tensors[1], tensors[1][..., :5] * float("nan")], -1)[..., :44]
    transposed = tensors[7].mT.contiguous().mT
    every_other = torch.stack([tensors[7]] * 2, -1)[..., 0]
    expanded = noise(1, 1, 24, dtype=dtype).expand(2, 70, 24)
    weights = [t.mT.contiguous().mT if t.dim() == 2 else t for t in tensors]
    for u, x_dbl, u_b, x_dbl_b, z in (
        (xz[..., :24], padded, xz[..., :24], transposed, xz[..., 24:]),
        (xz[..., :24].mT.contiguous().mT, padded, expanded, every_other, expanded),
    ):
        check_bidirectional_scan([u, x_dbl, *weights[2:6], u_b, x_dbl_b, *weights[8:12], z], 64)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("channel_last", [False, True], ids=["channel first", "channel last"])
@pytest.mark.parametrize("kind", ["plain", "bare", "no softplus", "grouped", "constant", "constant B", "mixed groups"])
def test_selective_scan(kind, channel_last, reverse, dtype):
    inputs = {k: v.detach() for k, v in make_scan_inputs(2, 36, 67, 6, dtype=dtype).items()}
    if kind == "bare":
        inputs.update(D=None, z=None, delta_bias=None)
    if kind == "grouped":
        inputs.update(B=noise(2, 2, 6, 67, dtype=dtype), C=noise(2, 2, 6, 67, dtype=dtype))
    if kind == "mixed groups":
        inputs.update(B=noise(2, 4, 6, 67, dtype=dtype), C=noise(2, 6, 67, 6, dtype=dtype).mT)
    if kind in ("constant", "constant B"):
        inputs["B"] = noise(36, 6)
    if kind == "constant":
        inputs["C"] = noise(6, 36).mT
    if channel_last:
        for name in ("u", "delta", "z"):
            inputs[name] = None if inputs[name] is None else inputs[name].mT.contiguous().mT
    check_selective_scan(inputs, reverse, kind != "no softplus", 32)
    # Strides are part of what the fakes promise.
    if channel_last:
        assert torch.ops.vim.selective_scan(*inputs.values(), True, reverse, 0)[0].stride() == inputs["u"].stride()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("length", [1, 5, 64, 131])
def test_convolutions(length, width, dtype):
    x = noise(2, length, 44, dtype=dtype)[..., 5:38]
    dout, dout_b = noise(2, 33, length, dtype=dtype).mT, noise(2, 1, 33, dtype=dtype).expand(2, length, 33)
    weight, weight_b, bias = noise(33, width), noise(4, 33).mT, noise(33)
    for biases in ((bias, None), (None, bias)):
        check("bidirectional_conv1d", x, weight, biases[0], weight_b, biases[1])
        check("bidirectional_conv1d_backward", dout, dout_b, x, weight, biases[0], weight_b, biases[1])
        for silu in (False, True):
            for reverse in (False, True):
                check("causal_conv1d", x.mT, weight, biases[0], silu, reverse)
                check("causal_conv1d_backward", dout.mT, x.mT.contiguous(), weight, biases[0], silu, reverse)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 48), (33, 192)], ids=str)
def test_add_rms_norm(shape, dtype):
    wide = noise(*shape[:-1], 2 * shape[-1], dtype=dtype)
    x, residual, weight = wide[..., : shape[-1]], noise(*shape), noise(shape[-1])
    for r in (residual, None, residual.expand(shape)):
        check("add_rms_norm", x, r, weight, 1e-5)
    check("add_rms_norm", x.transpose(0, -1).contiguous().transpose(0, -1), residual, weight, 1e-5)
    apart = x.contiguous()[None].transpose(0, -2)  # of an axis of size 1, a stride says nothing
    check("add_rms_norm", apart, residual.view(apart.shape), weight, 1e-5)
    for dy in (x, None):
        for dr in (residual.flip(0), None):
            check("add_rms_norm_backward", dy, dr, residual, weight, 1e-5)


def test_empty_batch_and_empty_sequence():
    for batch, length in ((0, 5), (2, 0), (0, 0)):
        check_bidirectional_scan([t.detach() for t in make_bidirectional_inputs(batch, length, 6, 4, 2)], 64)
        inputs = {k: v.detach() for k, v in make_scan_inputs(batch, 6, length, 4).items()}
        check_selective_scan(inputs, True, True, 64)
        x, weight = noise(batch, length, 6), noise(6, 4)
        check("bidirectional_conv1d", x, weight, None, weight, None)
        check("bidirectional_conv1d_backward", x, x, x, weight, None, weight, None)
        check("add_rms_norm", x, None, noise(6), 1e-5)
        check("add_rms_norm_backward", x, None, x, noise(6), 1e-5)


def test_extreme_inputs_stay_finite_and_right():
    """Steps from nothing to so large that every state is forgotten; gates far out on both sides."""
    inputs = {k: v.detach() for k, v in make_scan_inputs(1, 24, 40, 16).items()}
    inputs["delta"] = torch.linspace(-120, 120, 40).expand(1, 24, 40)
    inputs["z"] = torch.linspace(-120, 120, 24)[None, :, None].expand(1, 24, 40)
    check_selective_scan(inputs, False, True, 16)
    for delta in (1e4, -1e4, 0.0):
        inputs["delta"] = torch.full((1, 24, 40), delta)
        out = torch.ops.vim.selective_scan(*inputs.values(), True, False, 0)[0]
        assert torch.isfinite(out).all()


def test_small_steps_keep_their_relative_accuracy():
    """softplus(x) for very negative x is exp(x), to the last digits."""
    x = torch.linspace(-80, 80, 641).view(-1, 1, 1)  # scans of one token: y = softplus(x)
    ones, A = torch.ones(641, 1, 1), torch.full((1, 1), -1.0)
    y = torch.ops.vim.selective_scan(ones, x, A, ones, ones, None, None, None, True, False, 0)[0]
    expected = torch.nn.functional.softplus(x.double(), threshold=100)
    assert ((y.double() - expected).abs() / expected).max() < 3e-7


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_shapes(data):
    size = st.integers(1, 40)
    batch, dim, d_state, dt_rank = (
        data.draw(s) for s in (st.integers(1, 3), size, st.integers(1, 20), st.integers(1, 20))
    )
    length, every = data.draw(st.integers(1, 140)), data.draw(st.integers(1, 90))
    dtype, seed = data.draw(st.sampled_from(FLOATS)), data.draw(st.integers(0, 99))
    tensors = [t.detach() for t in make_bidirectional_inputs(batch, length, dim, d_state, dt_rank, dtype, seed)]
    check_bidirectional_scan(tensors, every)
    inputs = {k: v.detach() for k, v in make_scan_inputs(batch, dim, length, d_state, dtype, seed).items()}
    check_selective_scan(inputs, data.draw(st.booleans()), data.draw(st.booleans()), every)


def _everything(seed: int = 0, batch: int = 2, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """All results of all ops, from inputs large enough for several threads."""
    tensors = [t.detach() for t in make_bidirectional_inputs(batch, 197, 96, 16, 12, dtype, seed)]
    x = tensors[0]
    y, checkpoints = torch.ops.vim.bidirectional_scan(*tensors, 0.5, 64)
    results = [y, checkpoints, *torch.ops.vim.bidirectional_scan_backward(x, *tensors, checkpoints, 0.5, 64)]
    weights = (noise(96, 4), noise(96), noise(96, 4), noise(96))
    results += torch.ops.vim.bidirectional_conv1d(x, *weights)
    results += torch.ops.vim.bidirectional_conv1d_backward(x, y, x, *weights)
    normed, r = torch.ops.vim.add_rms_norm(x, None, weights[1], 1e-5)
    results += [normed, r, *torch.ops.vim.add_rms_norm_backward(x, r, r, weights[1], 1e-5)]
    inputs = {k: v.detach() for k, v in make_scan_inputs(batch, 96, 197, 16, dtype, seed).items()}
    out, state, entry = torch.ops.vim.selective_scan(*inputs.values(), True, True, 64)
    results += [out, state, entry]
    results += torch.ops.vim.selective_scan_backward(out, state, *inputs.values(), entry, True, True, 64)
    results.append(torch.ops.vim.causal_conv1d(x.mT, *weights[:2], True, False))
    results += torch.ops.vim.causal_conv1d_backward(x.mT, x.mT, *weights[:2], True, False)
    product = x.new_empty(x.shape[0] * x.shape[1], 44)
    torch.ops.vim.product_(x.flatten(0, 1), noise(44, x.shape[2]).t(), noise(44), False, product)
    return [*results, product]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("batch", [1, 3])
def test_same_bits_for_any_number_of_threads(batch, dtype):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(_everything(batch=batch, dtype=dtype))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_every_output_is_written():
    """Fresh memory is filled with NaN, outputs and workspace alike."""
    before = torch.are_deterministic_algorithms_enabled()
    plain = _everything()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        filled = _everything()
        channels_first = make_scan_inputs(2, 5, 9, 3)
        filled += torch.ops.vim.selective_scan(*(t.detach() for t in channels_first.values()), True, False, 4)
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.isfinite(t).all() for t in filled)
    assert all(torch.equal(a, b) for a, b in zip(plain, filled, strict=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_workspace_is_below_one_and_a_half_inputs(dtype):
    tensors = [t.detach() for t in make_bidirectional_inputs(8, 197, 384, 16, 12, dtype)]
    checkpoints = torch.ops.vim.bidirectional_scan(*tensors, 0.5, 64)[1]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = torch.ops.vim.bidirectional_scan_backward(tensors[0], *tensors, checkpoints, 0.5, 64)
    # Everything that the op allocates lives to its end, so the sum is the peak.
    allocated = sum(e.self_cpu_memory_usage for e in profiler.events() if e.name == "aten::empty")
    outputs = sum(t.nbytes for t in results)
    assert allocated > outputs
    assert allocated - outputs < 1.5 * tensors[0].nbytes


def test_float64_and_complex_reach_the_reference_through_the_portable_op():
    tensors = [t.detach() for t in make_bidirectional_inputs(2, 9, 5, 3, 2, torch.float64)]
    check_bidirectional_scan(tensors, 4)
    x, weight, bias = noise(2, 9, 5).double(), noise(5, 4).double(), noise(5).double()
    check("bidirectional_conv1d", x, weight, bias, weight, None)
    check("add_rms_norm", x, None, bias, 1e-5)
    inputs = {k: v.detach() for k, v in make_scan_inputs(2, 5, 9, 3).items()}
    inputs["A"] = torch.complex(inputs["A"], noise(5, 3))
    inputs["B"], inputs["C"] = noise(2, 3, 18), noise(2, 3, 18)
    actual = torch.ops.vim.selective_scan(*inputs.values(), True, False, 4)
    expected = torch.ops.vim.selective_scan_reference(*inputs.values(), True, False, 4)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_wrong_sizes_raise_instead_of_reading_beyond():
    tensors = [t.detach() for t in make_bidirectional_inputs(2, 9, 5, 3, 2)]
    for i in range(13):
        wrong = [t[..., :-1] if j == i else t for j, t in enumerate(tensors)]
        with pytest.raises(RuntimeError, match="does not have the sizes"):
            torch.ops.vim.bidirectional_scan(*wrong, 0.5, 0)


@pytest.mark.parametrize(
    "case",
    [
        ("bidirectional_scan", lambda: (*make_bidirectional_inputs(2, 5, 3, 2, 2), 0.5, 3)),
        ("selective_scan", lambda: (*make_scan_inputs(2, 4, 5, 3).values(), True, False, 2)),
        ("bidirectional_conv1d", lambda: (noise(2, 5, 3).requires_grad_(), noise(3, 4), noise(3), noise(3, 4), None)),
        ("causal_conv1d", lambda: (noise(2, 3, 5).requires_grad_(), noise(3, 4), None, True, True)),
        ("add_rms_norm", lambda: (noise(2, 5, 3).requires_grad_(), noise(2, 5, 3), noise(3), 1e-5)),
    ],
    ids=lambda case: case[0],
)
def test_opcheck(case):
    op, make = case
    torch.library.opcheck(getattr(torch.ops.vim, op).default, make())
