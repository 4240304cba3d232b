"""What only the native CPU kernels have: instruction sets, their exponential, workspace, dtypes they leave alone."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.helpers import make_bidirectional_inputs, make_scan_inputs
from tests.ops import test_product
from tests.ops.conformance import OPS, check_extremes, detached, noise
from tests.ops.natives import needs_native
from tests.ops.test_conformance import NATIVE
from tests.processes import run_python
from vim.ops.backends import native as native

pytestmark = needs_native


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


def check_instruction_set() -> None:
    """One pass over what the instruction sets could do differently; run in processes of their own."""
    check_exponential()
    check_extremes(NATIVE)
    for check_products in test_product.CHECKS:
        check_products()
    for op, run in OPS.items():
        for case in NATIVE.cases(op):
            run(NATIVE.check, **case)


@pytest.mark.parametrize(
    "capability",
    ["avx2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("avx512bf16", "avx512", "baseline"))],
)
def test_every_instruction_set(capability):
    code = (
        "from tests.ops.test_native_kernels import check_instruction_set, native\n"
        "check_instruction_set()\nprint(native.capability())\n"
    )
    used = run_python("-c", code, VIM_CPU_CAPABILITY=capability).split()[-1]
    if used != capability:
        pytest.skip(f"not on this processor: {capability} kernels are not tested, {used} runs in their place")


def test_exponential():
    check_exponential()


def test_small_steps_keep_their_relative_accuracy():
    """softplus(x) for very negative x is exp(x), to the last digits."""
    x = torch.linspace(-80, 80, 641).view(-1, 1, 1)  # scans of one token: y = softplus(x)
    ones, A = torch.ones(641, 1, 1), torch.full((1, 1), -1.0)
    y = torch.ops.vim.selective_scan(ones, x, A, ones, ones, None, None, None, True, False, 0)[0]
    expected = torch.nn.functional.softplus(x.double(), threshold=100)
    assert ((y.double() - expected).abs() / expected).max() < 3e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_workspace_is_below_one_and_a_half_inputs(dtype):
    tensors = detached(make_bidirectional_inputs(8, 197, 384, 16, 12, dtype))
    checkpoints = torch.ops.vim.bidirectional_scan(*tensors, 0.5, 64)[1]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = torch.ops.vim.bidirectional_scan_backward(tensors[0], *tensors, checkpoints, 0.5, 64)
    # Everything that the op allocates lives to its end, so the sum is the peak.
    allocated = sum(e.self_cpu_memory_usage for e in profiler.events() if e.name == "aten::empty")
    outputs = sum(t.nbytes for t in results)
    assert allocated > outputs
    assert allocated - outputs < 1.5 * tensors[0].nbytes


def test_complex_reaches_the_reference_through_the_portable_op():
    inputs = {k: v.detach() for k, v in make_scan_inputs(2, 5, 9, 3).items()}
    inputs["A"] = torch.complex(inputs["A"], noise(5, 3))
    inputs["B"], inputs["C"] = noise(2, 3, 18), noise(2, 3, 18)
    actual = torch.ops.vim.selective_scan(*inputs.values(), True, False, 4)
    expected = torch.ops.vim.selective_scan_reference(*inputs.values(), True, False, 4)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
