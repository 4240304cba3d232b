"""What only the CUDA kernels have, emulated on the host: ways to cut a scan, rows that are apart."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.helpers import make_bidirectional_inputs, make_scan_inputs
from tests.ops.conformance import detached, noise
from tests.ops.test_bidirectional_block import make_inputs, make_weights
from tests.ops.test_conformance import EMULATED, LIBRARY
from vim.ops import bidirectional_block


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


def test_a_way_to_cut_that_does_not_exist_is_refused(tune):
    for wrong in ((3, 1, 0), (1, 3, 0), (1, 1, 60), (1, 1, -64)):
        assert not tune(*wrong)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)], ids=str)
def test_weights_of_a_layer_are_converted_together(dtypes):
    of_weights, of_activations = dtypes
    weights = make_weights(dtype=of_weights)
    x, _ = make_inputs(2, 9, 12, of_activations)
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        bidirectional_block(x.detach(), None, weights, backend="emulated")
    called = [event.name for event in profile.events()]
    assert "vim::bidirectional_block_emulated" in called
    assert not {"aten::to", "aten::_to_copy"} & set(called)


def test_norm_of_a_part_of_rows():
    x = noise(6, 48, dtype=torch.bfloat16)
    for part in (x[:, :24], x[:, 1:25], x[::2], x.view(2, 3, 48)[:, ::2]):
        EMULATED.check("add_rms_norm", part, None, noise(part.shape[-1]), 1e-5)
