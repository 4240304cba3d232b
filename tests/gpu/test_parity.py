"""Every backend on the GPU against the original's numbers and the reference: values and gradients."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.device import BACKENDS, DEVICE, needs_gpu, require
from tests.helpers import TOLERANCES, assert_close, golden_names
from tests.models import test_golden
from tests.ops import conformance
from tests.ops.conformance import FLOATS, PlainTarget, Target

pytestmark = needs_gpu

GPU = TOLERANCES[torch.float32].gpu
# The models' sizes beside odd ones.
SIZES = {
    "bidirectional_scan": {
        "length": (1, 37, 65, 197, 2049),
        "widths": ((24, 16, 2), (37, 5, 3), (384, 16, 12), (768, 16, 24)),
    },
    "selective_scan": {"length": (1, 197, 1031), "widths": ((6, 3), (24, 16), (36, 6))},
    "bidirectional_conv1d": {"length": (1, 19, 197, 1025), "dim": (8, 10, 66, 384)},
    "causal_conv1d": {"length": (1, 19, 197, 1025), "dim": (8, 10, 66, 384)},
    "add_rms_norm": {"shape": ((1, 1), (7, 33), (2, 197, 192), (5, 768), (3, 1500))},
}
# The packages' kernels take widths from 2 to 4 and keep no entry states.
PACKAGES = {
    **{op: {**axes, "every": (0,)} for op, axes in SIZES.items() if "scan" in op},
    "bidirectional_conv1d": {**SIZES["bidirectional_conv1d"], "widths": ((4, 4), (2, 3))},
    "causal_conv1d": {**SIZES["causal_conv1d"], "width": (2, 3, 4)},
    "add_rms_norm": {**SIZES["add_rms_norm"], "half_weight": (False,), "grads": ((True, True),)},
}
TARGETS = [
    Target("native", "", SIZES, DEVICE.type, on_gpu=True),
    Target("triton", "_triton", SIZES, DEVICE.type, on_gpu=True),
    PlainTarget("mamba_ssm", "", PACKAGES, DEVICE.type, True, ("segmented_scan", "segmented_conv1d")),
]
# The mixer's own backends: everything but mamba_ssm, which has two scans.
both = pytest.mark.parametrize("backend", BACKENDS)


def close(actual: torch.Tensor, expected: torch.Tensor, listed: object, what: str) -> None:
    """What stands in the place of the bound for float32 on the CPU."""
    assert_close(actual, expected, GPU, what)


@both
@pytest.mark.parametrize("case", golden_names("scan"))
def test_golden_scans(case, backend):
    require(backend, "selective_scan")
    if case.startswith("complex") and backend != "native":
        pytest.skip(f"{backend}: a complex A runs on the reference")
    conformance.check_golden_scan(case, backend, DEVICE.type, close)


@both
@pytest.mark.parametrize("case", golden_names("mixer"))
def test_golden_mixers(case, backend):
    require(backend, "bidirectional_scan")
    conformance.check_golden_mixer(case, backend, DEVICE.type, close)


@pytest.mark.parametrize("case", golden_names("models"))
def test_golden_models(case):
    model, metadata, tensors, drawn = test_golden.golden_model(case)
    model = model.to(DEVICE)
    drawn = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in drawn.items()}
    x = tensors["x"].to(DEVICE).requires_grad_()
    logits = test_golden.golden_logits(model, x, metadata, drawn)
    assert_close(logits.cpu(), tensors["logits64"], GPU, "logits")
    (logits * tensors["cotangent"].to(DEVICE)).sum().backward()
    assert_close(x.grad.cpu(), tensors["grad.x"], GPU, "grad.x")
    for key in (key for key in tensors if key.startswith("grad.") and key != "grad.x"):
        grad = model.get_parameter(key.removeprefix("grad.")).grad
        assert_close(grad.cpu(), tensors[key], GPU, key)


@pytest.mark.parametrize(("target", "op", "case"), list(conformance.parameters(TARGETS)))
def test_case(target, op, case):
    require(target.name, op, case["dtype"])
    conformance.OPS[op](target.check, **case)


@both
@pytest.mark.parametrize("dtype", FLOATS)
def test_two_runs_have_the_same_bits(dtype, backend):
    require(backend, "bidirectional_scan", dtype)
    if backend == "mamba_ssm":
        pytest.skip("mamba_ssm: its backward pass adds atomically")
    suffix = next(target.suffix for target in TARGETS if target.name == backend)
    results = [conformance.everything(suffix, (4, 197, 192, 16, 12), dtype, DEVICE.type) for _ in range(4)]
    for other in results[1:]:
        conformance.assert_same_bits(results[0], other)
