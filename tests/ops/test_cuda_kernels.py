"""The CUDA kernels, emulated on the host, against the reference: values, gradients, strides, dtypes, determinism."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import emulated
from tests.helpers import make_bidirectional_inputs, make_scan_inputs
from tests.ops.kernel_checks import FLOATS, KernelChecks, noise, run_op

LIBRARY = emulated.load()
checks = KernelChecks(emulated.SUFFIX)


@pytest.fixture(params=["ascending", "descending", "mixed"])
def thread_order(request):
    """The order in which the threads of a block run: without a barrier that is needed, results depend on it."""
    set_order = ctypes.CDLL(str(LIBRARY)).vim_emulation_order
    set_order(["ascending", "descending", "mixed"].index(request.param))
    yield request.param
    set_order(0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("length", "dim", "d_state", "dt_rank"),
    [(1, 1, 1, 1), (2, 5, 3, 12), (63, 64, 16, 12), (65, 24, 17, 5), (130, 40, 16, 24), (67, 8, 33, 48)],
)
def test_bidirectional_scan(length, dim, d_state, dt_rank, dtype):
    tensors = [t.detach() for t in make_bidirectional_inputs(2, length, dim, d_state, dt_rank, dtype)]
    checks.bidirectional_scan(tensors, 64)


@pytest.fixture
def tune():
    """Chooses how scans are cut, until the end of the test."""
    tune_scan = ctypes.CDLL(str(LIBRARY)).vim_cuda_tune_scan
    tune_scan.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    yield tune_scan
    assert tune_scan(0, 0, 0)


@pytest.mark.parametrize("chunk", [0, 64])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("warps", [1, 2, 4])
def test_every_way_to_cut_a_scan(warps, channels, chunk, tune):
    assert tune(channels, warps, chunk)
    for dtype, length, dim, dt_rank in (
        (torch.bfloat16, 133, 72, 12),
        (torch.bfloat16, 197, 66, 24),
        (torch.float32, 129, 40, 5),
        (torch.float16, 70, 33, 12),
    ):
        tensors = [t.detach() for t in make_bidirectional_inputs(2, length, dim, 16, dt_rank, dtype)]
        checks.check("bidirectional_scan", *tensors, 0.5, 64)
        checks.check("bidirectional_scan", *tensors, 1.0, 8)
        inputs = {k: v.detach() for k, v in make_scan_inputs(2, dim, length, 16, dtype).items()}
        for reverse in (False, True):
            checks.check("selective_scan", *inputs.values(), True, reverse, 64)


def test_a_way_to_cut_that_does_not_exist_is_refused(tune):
    for wrong in ((3, 1, 0), (1, 3, 0), (1, 1, 60), (1, 1, -64)):
        assert not tune(*wrong)


@pytest.mark.parametrize("every", [1, 3, 64, 1000, 2**62, 2**63 - 1])
def test_entry_states_at_any_distance(every):
    checks.bidirectional_scan([t.detach() for t in make_bidirectional_inputs(1, 70, 20, 5, 2)], every)
    inputs = {k: v.detach() for k, v in make_scan_inputs(1, 20, 70, 5).items()}
    for reverse in (False, True):
        checks.selective_scan(inputs, reverse, True, every)


@pytest.mark.parametrize("dtype", FLOATS)
def test_strides(dtype):
    """Halves of xz, padded rows, transposed and expanded operands."""
    tensors = [t.detach() for t in make_bidirectional_inputs(2, 37, 24, 16, 12, dtype=dtype)]
    xz = noise(2, 37, 48, dtype=dtype)
    padded = torch.cat([tensors[1], tensors[1][..., :4] * float("nan")], -1)[..., :44]
    transposed = tensors[7].mT.contiguous().mT
    every_other = torch.stack([tensors[7]] * 2, -1)[..., 0]
    expanded = noise(1, 1, 24, dtype=dtype).expand(2, 37, 24)
    weights = [t.mT.contiguous().mT if t.dim() == 2 else t for t in tensors]
    for u, x_dbl, u_b, x_dbl_b, z in (
        (xz[..., :24], padded, xz[..., :24], transposed, xz[..., 24:]),
        (xz[..., :24].mT.contiguous().mT, padded, expanded, every_other, expanded),
        (xz[..., 1:25], padded[..., 1:][..., [*range(43), 0]], xz[..., 3:27], padded, xz[..., 7:31]),
    ):
        checks.bidirectional_scan([u, x_dbl, *weights[2:6], u_b, x_dbl_b, *weights[8:12], z], 32)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("channel_last", [False, True], ids=["channel first", "channel last"])
@pytest.mark.parametrize("kind", ["plain", "bare", "no softplus", "grouped", "constant", "constant B", "mixed groups"])
def test_selective_scan(kind, channel_last, reverse, dtype):
    length = 37
    inputs = {k: v.detach() for k, v in make_scan_inputs(2, 36, length, 6, dtype=dtype).items()}
    if kind == "bare":
        inputs.update(D=None, z=None, delta_bias=None)
    if kind == "grouped":
        inputs.update(B=noise(2, 2, 6, length, dtype=dtype), C=noise(2, 2, 6, length, dtype=dtype))
    if kind == "mixed groups":
        inputs.update(B=noise(2, 4, 6, length, dtype=dtype), C=noise(2, 6, length, 6, dtype=dtype).mT)
    if kind in ("constant", "constant B"):
        inputs["B"] = noise(36, 6)
    if kind == "constant":
        inputs["C"] = noise(6, 36).mT
    if channel_last:
        for name in ("u", "delta", "z"):
            inputs[name] = None if inputs[name] is None else inputs[name].mT.contiguous().mT
    checks.selective_scan(inputs, reverse, kind != "no softplus", 16)
    out = run_op("selective_scan_emulated", *inputs.values(), True, reverse, 0)[0]
    assert out.stride() == run_op("selective_scan_reference", *inputs.values(), True, reverse, 0)[0].stride()


def test_empty_batch_and_empty_sequence():
    for batch, length in ((0, 5), (2, 0), (0, 0)):
        checks.bidirectional_scan([t.detach() for t in make_bidirectional_inputs(batch, length, 6, 4, 2)], 64)
        inputs = {k: v.detach() for k, v in make_scan_inputs(batch, 6, length, 4).items()}
        checks.selective_scan(inputs, True, True, 64)


def test_extreme_inputs_stay_finite_and_right():
    """Steps from nothing to so large that every state is forgotten; gates far out on both sides."""
    inputs = {k: v.detach() for k, v in make_scan_inputs(1, 24, 40, 16).items()}
    inputs["delta"] = torch.linspace(-120, 120, 40).expand(1, 24, 40)
    inputs["z"] = torch.linspace(-120, 120, 24)[None, :, None].expand(1, 24, 40)
    checks.selective_scan(inputs, False, True, 16)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_shapes(data):
    size = st.integers(1, 40)
    batch, dim, d_state, dt_rank = (
        data.draw(s) for s in (st.integers(1, 3), size, st.integers(1, 20), st.integers(1, 20))
    )
    length, every = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 90))
    dtype, seed = data.draw(st.sampled_from(FLOATS)), data.draw(st.integers(0, 99))
    tensors = [t.detach() for t in make_bidirectional_inputs(batch, length, dim, d_state, dt_rank, dtype, seed)]
    checks.bidirectional_scan(tensors, every)
    inputs = {k: v.detach() for k, v in make_scan_inputs(batch, dim, length, d_state, dtype, seed).items()}
    checks.selective_scan(inputs, data.draw(st.booleans()), data.draw(st.booleans()), every)


def _everything(dtype: torch.dtype) -> list[torch.Tensor]:
    """All results of the scans."""
    tensors = [t.detach() for t in make_bidirectional_inputs(2, 75, 72, 16, 12, dtype)]
    y, entry = run_op("bidirectional_scan_emulated", *tensors, 0.5, 64)
    results = [y, entry, *run_op("bidirectional_scan_backward_emulated", y, *tensors, entry, 0.5, 64)]
    inputs = [t.detach() for t in make_scan_inputs(2, 72, 75, 16, dtype).values()]
    out, state, entry = run_op("selective_scan_emulated", *inputs, True, True, 64)
    results += [out, state, entry]
    return [*results, *run_op("selective_scan_backward_emulated", out, state, *inputs, entry, True, True, 64)]


@pytest.fixture(scope="module")
def plain_results():
    return {dtype: _everything(dtype) for dtype in FLOATS}


@pytest.mark.parametrize("dtype", FLOATS)
def test_same_bits_in_every_order_of_threads(dtype, thread_order, plain_results):
    again = _everything(dtype)
    assert all(torch.equal(a, b) for a, b in zip(again, plain_results[dtype], strict=True))


def test_every_output_is_written(plain_results):
    """Fresh memory is filled with NaN, outputs and workspace alike."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        filled = _everything(torch.float32)
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.isfinite(t).all() for t in filled)
    assert all(torch.equal(a, b) for a, b in zip(filled, plain_results[torch.float32], strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
def test_same_bits_under_autocast(dtype, plain_results):
    """`loss.backward()` within the region: the products of the backward pass stay in float32."""
    with torch.autocast("cpu", torch.bfloat16):
        again = _everything(dtype)
    assert all(torch.equal(a, b) for a, b in zip(again, plain_results[dtype], strict=True))


def test_wrong_sizes_raise_instead_of_reading_beyond():
    tensors = [t.detach() for t in make_bidirectional_inputs(2, 9, 5, 3, 2)]
    for i in range(13):
        wrong = [t[..., :-1] if j == i else t for j, t in enumerate(tensors)]
        with pytest.raises(RuntimeError, match="does not have the sizes"):
            torch.ops.vim.bidirectional_scan_emulated(*wrong, 0.5, 0)


@pytest.mark.parametrize("family", ["bidirectional_scan", "selective_scan"])
def test_opcheck(family):
    bidirectional = (*make_bidirectional_inputs(2, 5, 3, 2, 2), 0.5, 3)
    selective = (*make_scan_inputs(2, 4, 5, 3).values(), True, False, 2)
    op = getattr(torch.ops.vim, family + emulated.SUFFIX).default
    torch.library.opcheck(op, bidirectional if family == "bidirectional_scan" else selective)
