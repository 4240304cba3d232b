"""Every backend on the GPU against the original's numbers and the reference: values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.gpu.device import BACKENDS, DEVICE, needs_gpu, require
from tests.helpers import assert_close, golden_names, load_golden, make_bidirectional_inputs, make_scan_inputs
from tests.layers import test_mixer
from tests.models import test_golden
from vim.ops import (
    ScanOperands,
    add_rms_norm,
    bidirectional_conv1d,
    bidirectional_scan,
    causal_conv1d,
    default_backend,
    selective_scan,
)

pytestmark = needs_gpu

# Largest difference relative to the largest magnitude, of values and of gradients. Half precision is compared with
# the float32 reference on the same rounded inputs.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# The mixer's own backends: everything but mamba_ssm, which has two scans.
both = pytest.mark.parametrize("backend", BACKENDS)


# ---- the original's numbers ----------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("case", golden_names("scan"))
def test_golden_scans(case, backend):
    require(backend, "selective_scan")
    metadata, tensors = load_golden("scan", case)
    inputs = {key[3:]: t.to(DEVICE).requires_grad_() for key, t in tensors.items() if key.startswith("in.")}
    if inputs["A"].is_complex() and backend != "native":
        pytest.skip(f"{backend}: a complex A runs on the reference")
    softplus = metadata["delta_softplus"] == "true"
    out, state = selective_scan(**inputs, delta_softplus=softplus, return_last_state=True, backend=backend)
    assert_close(out.cpu(), tensors["out64"], TOLERANCE[torch.float32], "out")
    assert_close(state.cpu(), tensors["last_state"], TOLERANCE[torch.float32], "last_state")
    grads = torch.autograd.grad(out, list(inputs.values()), tensors["cotangent"].to(DEVICE))
    for name, grad in zip(inputs, grads, strict=True):
        assert_close(grad.cpu(), tensors[f"grad.{name}"], TOLERANCE[torch.float32], f"grad.{name}")


@both
@pytest.mark.parametrize("case", golden_names("mixer"))
def test_golden_mixers(case, backend):
    require(backend, "bidirectional_scan")
    mixer, tensors = test_mixer._from_golden(case)
    mixer = mixer.to(DEVICE)
    x = tensors["x"].to(DEVICE).requires_grad_()
    with default_backend(backend):
        out = mixer(x)
        (out * tensors["cotangent"].to(DEVICE)).sum().backward()
    assert_close(out.cpu(), tensors["out64"], TOLERANCE[torch.float32], "out")
    assert_close(x.grad.cpu(), tensors["grad.x"], TOLERANCE[torch.float32], "grad.x")
    for name, parameter in mixer.named_parameters():
        assert_close(parameter.grad.cpu(), tensors[f"grad.param.{name}"], TOLERANCE[torch.float32], name)


@pytest.mark.parametrize("case", golden_names("models"))
def test_golden_models(case):
    model, metadata, tensors, drawn = test_golden._from_golden(case)
    model = model.to(DEVICE)
    drawn = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in drawn.items()}
    x = tensors["x"].to(DEVICE).requires_grad_()
    logits = test_golden._logits(model, x, metadata, drawn)
    assert_close(logits.cpu(), tensors["logits64"], TOLERANCE[torch.float32], "logits")
    (logits * tensors["cotangent"].to(DEVICE)).sum().backward()
    assert_close(x.grad.cpu(), tensors["grad.x"], TOLERANCE[torch.float32], "grad.x")
    for key in (key for key in tensors if key.startswith("grad.") and key != "grad.x"):
        grad = model.get_parameter(key.removeprefix("grad.")).grad
        assert_close(grad.cpu(), tensors[key], TOLERANCE[torch.float32], key)


# ---- the reference -------------------------------------------------------------------------------------------------


def check(run: Callable[..., object], inputs: list[torch.Tensor], backend: str, dtype: torch.dtype) -> None:
    """`run(backend, *inputs)` in `dtype` must be what the reference makes of the same inputs in float32."""
    results = []
    for name, wide in ((backend, False), ("reference", True)):
        leaves = [(t.float() if wide else t).detach().to(DEVICE).requires_grad_() for t in inputs]
        outputs = run(name, *leaves)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        rng = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(y.shape, generator=rng).to(inputs[0].dtype).to(y) for y in outputs]
        results.append((outputs, torch.autograd.grad(outputs, leaves, cotangents)))
    (outputs, grads), (expected, expected_grads) = results
    for i, (got, wanted) in enumerate(zip(outputs, expected, strict=True)):
        assert_close(got, wanted, TOLERANCE[dtype], f"output {i}")
    for i, (got, wanted) in enumerate(zip(grads, expected_grads, strict=True)):
        assert_close(got, wanted, TOLERANCE[dtype], f"gradient {i}")


@both
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    "shape",
    [(2, 197, 384, 16, 12), (1, 1, 24, 16, 2), (3, 65, 768, 16, 24), (1, 2049, 64, 16, 12), (2, 37, 37, 5, 3)],
    ids=str,
)
def test_bidirectional_scan(shape, dtype, backend):
    require(backend, "bidirectional_scan", dtype)

    def run(name: str, *t: torch.Tensor) -> torch.Tensor:
        return bidirectional_scan(ScanOperands(*t[:6]), ScanOperands(*t[6:12]), t[12], backend=name)

    check(run, make_bidirectional_inputs(*shape, dtype=dtype), backend, dtype)


@both
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(2, 24, 197, 16), (1, 5, 1, 3), (2, 40, 1031, 16)], ids=str)
def test_selective_scan(shape, dtype, reverse, backend):
    require(backend, "selective_scan", dtype)

    def run(name: str, *t: torch.Tensor) -> torch.Tensor:
        return selective_scan(*t, delta_softplus=True, reverse=reverse, backend=name)

    check(run, list(make_scan_inputs(*shape, dtype=dtype).values()), backend, dtype)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@both
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("batch", "seqlen", "dim", "width"), [(3, 197, 384, 4), (1, 1, 8, 4), (2, 1025, 66, 4), (2, 19, 10, 3)]
)
def test_convolutions(batch, seqlen, dim, width, dtype, backend):
    require(backend, "bidirectional_conv1d", dtype)
    weights = [normal(dim, width), normal(dim), normal(dim, width) * 0.5, normal(dim) * 0.5]
    x = normal(batch, seqlen, 2 * dim, dtype=dtype)

    def run_both(name: str, x: torch.Tensor, *w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return bidirectional_conv1d(x[..., :dim], *w, backend=name)

    def run_one(name: str, x: torch.Tensor, *w: torch.Tensor) -> torch.Tensor:
        return causal_conv1d(x[..., dim:].mT, *w, "silu", reverse=True, backend=name)

    check(run_both, [x, *weights], backend, dtype)
    check(run_one, [x, *weights[:2]], backend, dtype)


@both
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(2, 197, 192), (1, 1), (5, 768), (3, 1500), (7, 33)], ids=str)
def test_norm(shape, dtype, backend):
    require(backend, "add_rms_norm", dtype)
    inputs = [normal(*shape, dtype=dtype), normal(*shape) * 0.5, normal(shape[-1])]
    check(lambda name, x, r, w: add_rms_norm(x, r, w, backend=name), inputs, backend, dtype)


@both
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_two_runs_have_the_same_bits(dtype, backend):
    require(backend, "bidirectional_scan", dtype)
    if backend == "mamba_ssm":
        pytest.skip("mamba_ssm: its backward pass adds atomically")
    leaves = [t.detach().to(DEVICE).requires_grad_() for t in make_bidirectional_inputs(4, 197, 192, 16, 12, dtype)]

    def run() -> list[torch.Tensor]:
        u, u_b = bidirectional_conv1d(leaves[0], *conv, backend=backend)
        forward, backward = ScanOperands(u, *leaves[1:6]), ScanOperands(u_b, *leaves[7:12])
        y, r = add_rms_norm(
            bidirectional_scan(forward, backward, leaves[12], backend=backend), None, conv[1], backend=backend
        )
        return [y, r, *torch.autograd.grad((y.float() * r).sum(), [*leaves[:6], *leaves[7:], *conv])]

    conv = [normal(192, 4).to(DEVICE).requires_grad_(), normal(192).to(DEVICE).requires_grad_()] * 2
    conv = [t.detach().clone().requires_grad_() for t in conv]
    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
