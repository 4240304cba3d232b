"""What only the CUDA kernels have, emulated on the host: ways to cut a scan, rows that are apart."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.helpers import TOLERANCES, assert_close, make_bidirectional_inputs, make_scan_inputs
from tests.ops.conformance import detached, noise
from tests.ops.test_bidirectional_block import both_gradients, make_inputs, make_weights
from tests.ops.test_conformance import EMULATED, LIBRARY
from vim.ops import BlockWeights, bidirectional_block


@pytest.fixture
def tune():
    """Chooses how scans are cut, until the end of the test."""
    tune_scan = LIBRARY.vim_cuda_tune_scan
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
        (torch.bfloat16, 70, 64, 24),
        (torch.bfloat16, 197, 66, 24),
        (torch.float32, 129, 40, 5),
        (torch.float16, 70, 33, 12),
    ):
        tensors = detached(make_bidirectional_inputs(2, length, dim, 16, dt_rank, dtype))
        EMULATED.check("bidirectional_scan", *tensors, 0.5, 64)
        EMULATED.check("bidirectional_scan", *tensors, 1.0, 8)
        inputs = {k: v.detach() for k, v in make_scan_inputs(2, dim, length, 16, dtype).items()}
        for reverse in (False, True):
            EMULATED.check("selective_scan", *inputs.values(), True, reverse, 64)


@pytest.mark.parametrize("chunks", [1, 2, 100])
def test_every_way_to_cut_a_backward_scan(chunks):
    tune_backward = LIBRARY.vim_cuda_tune_backward
    tune_backward.argtypes = [ctypes.c_int64]
    assert tune_backward(chunks)
    try:
        for dtype, length, dim, dt_rank in (
            (torch.bfloat16, 200, 72, 12),
            (torch.bfloat16, 133, 40, 24),
            (torch.bfloat16, 70, 64, 48),
            (torch.float16, 100, 34, 24),
            (torch.float32, 129, 40, 12),
            (torch.float32, 129, 33, 5),
        ):
            tensors = detached(make_bidirectional_inputs(2, length, dim, 16, dt_rank, dtype))
            for every in (64, 8):
                y, states = EMULATED.check("bidirectional_scan", *tensors, 0.5, every)
                dy = noise(*y.shape, dtype=dtype)
                EMULATED.check("bidirectional_scan_backward", dy, *tensors, states, 0.5, every)
            inputs = [v.detach() for v in make_scan_inputs(2, dim, length, 16, dtype).values()]
            for reverse in (False, True):
                y, last, states = EMULATED.check("selective_scan", *inputs, True, reverse, 64)
                grads = noise(*y.shape, dtype=dtype), noise(*last.shape)
                EMULATED.check("selective_scan_backward", *grads, *inputs, states, True, reverse, 64)
    finally:
        assert tune_backward(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_errors_of_a_gpus_approximate_instructions(dtype):
    tensors = detached(make_bidirectional_inputs(2, 133, 40, 16, 12, dtype))
    LIBRARY.vim_emulation_rounding(1)
    try:
        y, states = EMULATED.check("bidirectional_scan", *tensors, 0.5, 64)
        rounded = torch.ops.vim.bidirectional_scan_emulated(*tensors, 0.5, 64)[1]
        EMULATED.check("bidirectional_scan_backward", noise(*y.shape, dtype=dtype), *tensors, states, 0.5, 64)
    finally:
        LIBRARY.vim_emulation_rounding(0)
    assert not torch.equal(rounded, torch.ops.vim.bidirectional_scan_emulated(*tensors, 0.5, 64)[1])


def test_a_long_sequence_of_few_channels_is_cut():
    tensors = detached(make_bidirectional_inputs(1, 395, 8, 16, 3, torch.float32))
    EMULATED.check("bidirectional_scan", *tensors, 0.5, 64)


@pytest.mark.parametrize(("warps", "chunk"), [(1, 0), (2, 64)])
def test_large_ranks_by_tensor_cores(warps, chunk, tune):
    """Tensor cores take bfloat16 weights and activations, and at least two channels a thread."""
    weights = make_weights(24, 136, 48, 16, dtype=torch.bfloat16)  # the last warp has 8 channels
    x, residual = make_inputs(2, 75, 24, torch.bfloat16)

    def run(channels):
        assert tune(channels, warps, chunk)
        arguments = (None if w is None else w.detach() for w in weights)
        return torch.ops.vim.bidirectional_block_emulated(
            x.detach(), residual.detach(), *arguments, torch.bfloat16, 1e-5, 0.5, 8
        )

    (y, *_, states), (expected, *_, expected_states) = run(2), run(1)
    assert not torch.equal(states, expected_states), "the same kernel"
    assert_close(states, expected_states, TOLERANCES[torch.float32].value)
    assert_close(y, expected, TOLERANCES[torch.bfloat16].value)
    try:
        for order in range(1, 5):
            LIBRARY.vim_emulation_order(order)
            assert all(torch.equal(*pair) for pair in zip(run(2)[::4], (y, states), strict=True)), order
    finally:
        LIBRARY.vim_emulation_order(0)


def test_a_way_to_cut_that_does_not_exist_is_refused(tune):
    for wrong in ((3, 1, 0), (1, 3, 0), (1, 1, 60), (1, 1, -64)):
        assert not tune(*wrong)


@pytest.mark.parametrize(
    ("of_weights", "forward", "backward"),
    [
        # Forward: norm, convolutions, scans. Backward: the convolutions and the norm again; four for the scans; two
        # each for the gradients of convolutions and norm.
        (torch.bfloat16, 3, 10),
        # And what converts the products' weights, in the backward pass their gradients too.
        (torch.float32, 4, 12),
    ],
    ids=str,
)
def test_kernels_that_a_layer_starts(of_weights, forward, backward):
    """PyTorch's products are not among them. PyTorch converts the gradient of the input, and no weight."""
    LIBRARY.vim_emulation_launches.restype = ctypes.c_int64
    weights, (x, _) = make_weights(24, 48, 4, 16, biases=False, dtype=of_weights), make_inputs(2, 9, 24, torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        start = LIBRARY.vim_emulation_launches()
        out, _ = bidirectional_block(x, None, weights, backend="emulated")
        middle = LIBRARY.vim_emulation_launches()
        torch.autograd.grad(out, [w for w in weights if w is not None and w.dim() != 1], torch.ones_like(out))
        end = LIBRARY.vim_emulation_launches()
    assert (middle - start, end - middle) == (forward, backward)
    called = [event.name for event in profile.events()]
    assert {"vim::bidirectional_block_emulated", "vim::bidirectional_block_backward_emulated"} <= set(called)
    assert called.count("aten::_to_copy") == 1


@pytest.mark.parametrize(
    "half", [("A_log", "dt_weight"), ("conv_weight", "D_b"), ("norm_weight", "x_proj_b", "in_proj")]
)
def test_a_layer_with_weights_of_several_dtypes(half):
    weights, inputs = make_weights(24, 48, 4, 16), make_inputs(2, 9, 24)
    mixed = weights._replace(**{name: getattr(weights, name).detach().half().requires_grad_() for name in half})
    rounded = BlockWeights(*(None if w is None else w.detach().float().requires_grad_() for w in mixed))
    outputs, expected = (bidirectional_block(*inputs, w, backend="emulated") for w in (mixed, rounded))
    for got, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(got, wanted)
    for name, got, wanted in zip(
        mixed._fields, both_gradients(outputs, mixed), both_gradients(expected, rounded), strict=True
    ):
        assert torch.equal(got, wanted.to(torch.float16 if name in half else torch.float32)), name


def test_norm_of_a_part_of_rows():
    x = noise(6, 48, dtype=torch.bfloat16)
    for part in (x[:, :24], x[:, 1:25], x[::2], x.view(2, 3, 48)[:, ::2]):
        EMULATED.check("add_rms_norm", part, None, noise(part.shape[-1]), 1e-5)
