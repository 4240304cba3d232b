"""The Triton kernels against golden vectors and the reference: values, gradients, kinds of input, determinism.

Not collected by itself, because Triton reads TRITON_INTERPRET when it is imported: `test_triton.py` runs this file in a
process of its own, in Triton's interpreter on the CPU, or on a GPU, with more and longer sequences, where there is one.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import logging
import os

import pytest
import torch

import vim
from tests.helpers import (
    TOLERANCES,
    assert_close,
    assert_golden,
    golden_names,
    golden_tolerances,
    gradients,
    load_golden,
    make_bidirectional_inputs,
    make_scan_inputs,
)
from vim.checkpoints.upstream import translate_mixer_args
from vim.ops import ScanOperands, available_backends, bidirectional_scan, default_backend, selective_scan
from vim.ops.backends import triton as triton_backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# A program and token take the interpreter some 10 ms forward and 40 backward: it gets short sequences, and of shapes
# and dtypes each with one of the others.
SCANS = [name for name in golden_names("scan") if not INTERPRETED or not name.endswith(("L64", "L197", "L1000"))]
# The others differ from these outside of the kernels.
MIXERS = ["none", "v1", "v2_L1", "v2_L3", "v2_dconv3_expand1_dstate8_dtrank5", "v2_div"]
MIXERS = MIXERS if INTERPRETED else golden_names("mixer")
MORE_LENGTHS = [] if INTERPRETED else [64, 65, 197, 1025]


def _with_dtypes(*shapes: tuple[int, ...]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Every shape with every dtype, or in the interpreter with one."""
    return list(zip(shapes, FLOATS, strict=True)) if INTERPRETED else list(itertools.product(shapes, FLOATS))


if INTERPRETED:
    from triton.runtime import interpreter

    _patched: set[str] = set()

    def _call(self, *args, **kwargs):
        # A launch makes the language run on the CPU as kernels see it, and every call of a device function does so
        # again, which takes longer than most functions. It is needed for Triton's own, and once.
        if (module := self.fn.__module__).startswith("triton.") and module not in _patched:
            interpreter._patch_lang(self.fn)
            _patched.add(module)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = _call
    # Looks for int32 overflow, which sizes like these cannot have.
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )


@pytest.fixture(autouse=True)
def _wide_blocks(monkeypatch, request):
    """Blocks of 64 channels, which are fewer programs; `lanes` marks a test that wants others."""
    if INTERPRETED:
        marker = request.node.get_closest_marker("lanes")
        _set_lanes(monkeypatch, marker.args[0] if marker else 64)


def _set_lanes(monkeypatch, count: int) -> None:
    for op in ("selective_scan", "bidirectional_scan"):
        monkeypatch.setattr(importlib.import_module(f"vim.ops.{op}.triton"), "lanes", lambda device: count)


def _noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 9) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def _run(op: str, *args: object) -> tuple[torch.Tensor, ...]:
    result = getattr(torch.ops.vim, op)(*args)
    return result if isinstance(result, tuple) else (result,)


def _check(op: str, *args: object) -> tuple[torch.Tensor, ...]:
    """The kernel's results must agree with the reference's; returns the reference's."""
    kind = int("backward" in op)
    with torch.no_grad():
        actual, expected = _run(f"{op}_triton", *args), _run(f"{op}_reference", *args)
    for i, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert got.dtype == wanted.dtype, f"{op} output {i}"
        assert_close(got, wanted, TOLERANCES[wanted.dtype][kind], f"{op} output {i}")
    return expected


def _check_bidirectional_scan(tensors: list[torch.Tensor], every: int) -> None:
    entry = _check("bidirectional_scan", *tensors, 0.5, every)[1]
    dy = _noise(*tensors[0].shape, dtype=tensors[0].dtype)
    _check("bidirectional_scan_backward", dy, *tensors, entry, 0.5, every)


def _check_selective_scan(inputs: dict[str, torch.Tensor | None], softplus: bool, reverse: bool, every: int) -> None:
    tensors, settings = list(inputs.values()), (softplus, reverse, every)
    _, state, entry = _check("selective_scan", *tensors, *settings)
    dout = _noise(*tensors[0].shape, dtype=tensors[0].dtype)
    dlast = _noise(*state.shape) if reverse else None
    _check("selective_scan_backward", dout, dlast, *tensors, entry, *settings)


def _bidirectional(*shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [t.detach().to(DEVICE) for t in make_bidirectional_inputs(*shape, dtype=dtype)]


def _single(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor | None]:
    return {name: t.detach().to(DEVICE) for name, t in make_scan_inputs(*shape, dtype=dtype).items()}


def test_the_backend_is_there():
    for op in ("selective_scan", "bidirectional_scan", "causal_conv1d", "bidirectional_conv1d", "add_rms_norm"):
        for dtype in FLOATS:
            assert "triton" in available_backends(op, DEVICE, dtype)


@pytest.mark.parametrize("case", SCANS)
def test_golden_scan(case, caplog):
    metadata, tensors = load_golden("scan", case)
    inputs = {k[3:]: t.to(DEVICE).requires_grad_() for k, t in tensors.items() if k.startswith("in.")}
    softplus = metadata["delta_softplus"] == "true"
    triton_backend._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "vim"):
        out, state = selective_scan(**inputs, delta_softplus=softplus, return_last_state=True, backend="triton")
    expected = "does not compute selective_scan in complex64: the reference runs" if case.startswith("complex") else ""
    assert expected in caplog.text
    assert bool(expected) == bool(caplog.text)
    listed = golden_tolerances(f"scan/{case}")
    assert_golden(out.cpu(), tensors["out64"], listed["out"], "out")
    assert_golden(state.cpu(), tensors["last_state"], listed["last_state"], "last_state")
    grads = torch.autograd.grad(out, list(inputs.values()), tensors["cotangent"].to(DEVICE))
    for name, grad in zip(inputs, grads, strict=True):
        assert_golden(grad.cpu(), tensors[f"grad.{name}"], listed[f"grad.{name}"], f"grad.{name}")


@pytest.mark.parametrize("case", MIXERS)
def test_golden_mixer(case):
    metadata, tensors = load_golden("mixer", case)
    mixer = vim.Mamba(int(metadata["d_model"]), **translate_mixer_args(**json.loads(metadata["config"])))
    mixer.load_state_dict({k.removeprefix("param."): t for k, t in tensors.items() if k.startswith("param.")})
    mixer.to(DEVICE)
    x = tensors["x"].to(DEVICE).requires_grad_()
    with default_backend("triton"):
        out = mixer(x)
        (out * tensors["cotangent"].to(DEVICE)).sum().backward()
    listed = golden_tolerances(f"mixer/{case}")
    assert_golden(out.cpu(), tensors["out64"], listed["out"], "out")
    assert_golden(x.grad.cpu(), tensors["grad.x"], listed["grad.x"], "grad.x")
    for name, parameter in mixer.named_parameters():
        key = f"grad.param.{name}"
        assert_golden(parameter.grad.cpu(), tensors[key], listed[key], key)


@pytest.mark.lanes(16)
@pytest.mark.parametrize(
    ("shape", "dtype"), _with_dtypes((1, 13, 8, 16, 4), (2, 6, 20, 5, 3), (1, 1, 1, 1, 1)), ids=str
)
def test_bidirectional_scan(shape, dtype):
    """Blocks that are full and not, states and ranks that are powers of two and not, chunks and pieces cut short."""
    _check_bidirectional_scan(_bidirectional(*shape, dtype=dtype), 5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("length", [4, *MORE_LENGTHS])
def test_bidirectional_scan_of_the_models(length, dtype):
    """16 states and a rank of 12, in whole chunks and pieces or not."""
    _check_bidirectional_scan(_bidirectional(1, length, 40, 16, 12, dtype=dtype), 64)


@pytest.mark.parametrize("every", [1, 3, 64])
def test_entry_states_at_any_distance(every):
    _check_bidirectional_scan(_bidirectional(1, 7, 6, 4, 2), every)


@pytest.mark.parametrize("dtype", [torch.bfloat16] if INTERPRETED else FLOATS)
def test_strides(dtype):
    """Halves of xz, padded rows, transposed and expanded operands."""
    tensors = _bidirectional(2, 6, 24, 4, 4, dtype=dtype)
    xz = _noise(2, 6, 48, dtype=dtype)
    padded = torch.cat([tensors[1], torch.full((2, 6, 4), float("nan"), device=DEVICE, dtype=dtype)], -1)[..., :12]
    transposed = tensors[7].mT.contiguous().mT
    expanded = _noise(1, 1, 24, dtype=dtype).expand(2, 6, 24)
    weights = [t.mT.contiguous().mT if t.dim() == 2 else t for t in tensors]
    for u, u_b, z in (
        (xz[..., :24], xz[..., :24], xz[..., 24:]),
        (xz[..., :24].mT.contiguous().mT, expanded, expanded),
    ):
        _check_bidirectional_scan([u, padded, *weights[2:6], u_b, transposed, *weights[8:12], z], 4)


@pytest.mark.lanes(8)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("kind", ["plain", "bare", "no softplus", "grouped", "constant", "constant B", "mixed groups"])
def test_selective_scan(kind, reverse):
    inputs = _single(1, 12, 6, 3)
    if kind == "bare":
        inputs.update(D=None, z=None, delta_bias=None)
    if kind == "no softplus":  # steps must be positive, or states grow without bound
        inputs.update(delta=inputs["delta"].abs() / 8, delta_bias=inputs["delta_bias"].abs() / 8)
    if kind == "grouped":
        inputs.update(B=_noise(1, 2, 3, 6), C=_noise(1, 2, 3, 6))
    if kind == "mixed groups":
        inputs.update(B=_noise(1, 3, 3, 6), C=_noise(1, 2, 6, 3).mT)
    if kind in ("constant", "constant B"):
        inputs["B"] = _noise(12, 3)
    if kind == "constant":
        inputs["C"] = _noise(3, 12).mT
    if reverse:  # channel-last as well
        inputs.update({n: inputs[n].mT.contiguous().mT for n in ("u", "delta", "z") if inputs[n] is not None})
    _check_selective_scan(inputs, kind != "no softplus", reverse, 4)
    out = torch.ops.vim.selective_scan_triton(*inputs.values(), True, reverse, 0)[0]
    assert out.stride() == inputs["u"].stride(), "strides are part of what the fakes promise"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [5, *MORE_LENGTHS])
def test_selective_scan_in_half_precision(dtype, length):
    _check_selective_scan(_single(2, 6, length, 4, dtype=dtype), True, True, 64)


def test_small_steps_keep_their_relative_accuracy():
    """softplus(x) for very negative x is exp(x), to the last digits."""
    x = torch.linspace(-16, 20, 64, device=DEVICE).view(1, -1, 1)  # scans of one token: y = softplus(x)
    ones, A, B = torch.ones_like(x), torch.full((64, 1), -1.0, device=DEVICE), torch.ones(1, 1, 1, device=DEVICE)
    y = torch.ops.vim.selective_scan_triton(ones, x, A, B, B, None, None, None, True, False, 0)[0]
    expected = torch.nn.functional.softplus(x.double(), threshold=100)
    assert ((y.double() - expected).abs() / expected).max() < 3e-6


def test_extreme_steps_stay_finite():
    inputs = _single(1, 4, 3, 3)
    for delta in (1e4, -1e4, 0.0):
        inputs["delta"] = torch.full_like(inputs["delta"], delta)
        assert torch.isfinite(_run("selective_scan_triton", *inputs.values(), True, False, 0)[0]).all()


@pytest.mark.parametrize(("shape", "dtype"), _with_dtypes((19, 3, 4), (5, 1, 7), (1, 4, 4)), ids=str)
def test_convolutions(shape, dtype):
    length, width, width_b = shape
    x = _noise(2, length, 44, dtype=dtype)[..., 5:38]
    dout, dout_b = _noise(2, 33, length, dtype=dtype).mT, _noise(2, 1, 33, dtype=dtype).expand(2, length, 33)
    weight, weight_b, bias = _noise(33, width), _noise(width_b, 33).mT, _noise(33)
    for silu, first, second in ((False, bias, None), (True, None, bias)):
        _check("bidirectional_conv1d", x, weight, first, weight_b, second)
        _check("bidirectional_conv1d_backward", dout, dout_b, x, weight, first, weight_b, second)
        for reverse in (False, True):
            _check("causal_conv1d", x.mT, weight, first, silu, reverse)
            _check("causal_conv1d_backward", dout.mT, x.mT.contiguous(), weight, first, silu, reverse)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 48)], ids=str)
def test_add_rms_norm(shape, dtype, monkeypatch):
    monkeypatch.setattr(importlib.import_module("vim.ops.add_rms_norm.triton"), "_SHARES", 4)
    wide = _noise(*shape[:-1], 2 * shape[-1], dtype=dtype)
    x, residual, weight = wide[..., : shape[-1]], _noise(*shape), _noise(shape[-1])
    for r in (residual, None):
        _check("add_rms_norm", x, r, weight, 1e-5)
    _check("add_rms_norm", x.transpose(0, -1).contiguous().transpose(0, -1), residual, weight, 1e-5)
    for dy in (x, None):
        for dr in (residual.flip(0), None):
            _check("add_rms_norm_backward", dy, dr, residual, weight, 1e-5)


def _everything() -> list[torch.Tensor]:
    """All results of all ops."""
    tensors = _bidirectional(1, 5, 20, 5, 3)
    x = tensors[0]
    y, entry = torch.ops.vim.bidirectional_scan_triton(*tensors, 0.5, 4)
    results = [y, entry, *torch.ops.vim.bidirectional_scan_backward_triton(x, *tensors, entry, 0.5, 4)]
    weights = (_noise(20, 4), _noise(20), _noise(20, 4), _noise(20))
    results += torch.ops.vim.bidirectional_conv1d_triton(x, *weights)
    results += torch.ops.vim.bidirectional_conv1d_backward_triton(x, y, x, *weights)
    normed, r = torch.ops.vim.add_rms_norm_triton(x, None, weights[1], 1e-5)
    results += [normed, r, *torch.ops.vim.add_rms_norm_backward_triton(x, r, r, weights[1], 1e-5)]
    inputs = _single(1, 20, 5, 5)
    out, state, entry = torch.ops.vim.selective_scan_triton(*inputs.values(), True, True, 4)
    results += [out, state, entry]
    results += torch.ops.vim.selective_scan_backward_triton(out, state, *inputs.values(), entry, True, True, 4)
    results.append(torch.ops.vim.causal_conv1d_triton(x.mT, *weights[:2], True, False))
    results += torch.ops.vim.causal_conv1d_backward_triton(x.mT, x.mT, *weights[:2], True, False)
    return results


@pytest.mark.lanes(16)
def test_same_bits_again_and_every_number_is_written():
    """The second time, fresh memory is filled with NaN, outputs and workspace alike."""
    plain = _everything()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        filled = _everything()
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(a, b) for a, b in zip(plain, filled, strict=True))


def test_empty_batch():
    for op, args in (
        ("bidirectional_scan", (*_bidirectional(0, 5, 6, 4, 2), 0.5, 64)),
        ("selective_scan", (*_single(0, 6, 5, 4).values(), True, False, 64)),
        ("bidirectional_conv1d", (_noise(0, 5, 6), _noise(6, 4), None, _noise(6, 4), None)),
        ("add_rms_norm", (_noise(0, 6), None, _noise(6), 1e-5)),
        ("add_rms_norm_backward", (_noise(0, 6), None, _noise(0, 6), _noise(6), 1e-5)),
    ):
        _check(op, *args)


@pytest.mark.parametrize("merge", ["mean", "sum"])
def test_gradients_through_autograd(merge):
    """v1 mixers: the directions share all operands but the decay."""
    leaves = [t.requires_grad_() for t in _bidirectional(1, 5, 6, 4, 2)]

    def scan(backend: str) -> torch.Tensor:
        shared = ScanOperands(*leaves[:4], leaves[10], leaves[5])
        return bidirectional_scan(ScanOperands(*leaves[:6]), shared, leaves[12], merge, backend=backend)

    used = [*leaves[:6], leaves[10], leaves[12]]
    actual, expected = scan("triton"), scan("reference")
    assert_close(actual, expected, TOLERANCES[torch.float32][0])
    for got, wanted in zip(gradients(actual.cpu(), used), gradients(expected.cpu(), used), strict=True):
        assert_close(got, wanted, TOLERANCES[torch.float32][1])


def test_registration():
    """Fakes, autograd and schema hold, and the op stands in compiled graphs."""
    tensors = [t.requires_grad_() for t in _bidirectional(1, 1, 3, 2, 2)]
    torch.library.opcheck(torch.ops.vim.bidirectional_scan_triton.default, (*tensors, 0.5, 1))
    x, weight = _noise(2, 5).requires_grad_(), _noise(5).requires_grad_()
    torch.library.opcheck(torch.ops.vim.add_rms_norm_triton.default, (x, None, weight, 1e-5))
    inputs = {name: t.requires_grad_() for name, t in _single(1, 3, 2, 2).items()}
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    actual, expected = (f(**inputs, delta_softplus=True, backend="triton") for f in (compiled, selective_scan))
    assert_close(actual, expected, 1e-6)
    leaves = list(inputs.values())
    for got, wanted in zip(gradients(actual.cpu(), leaves), gradients(expected.cpu(), leaves), strict=True):
        assert_close(got, wanted, 1e-5)


def test_what_triton_does_not_compute_is_refused():
    inputs = make_scan_inputs(1, 4, 5, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"'triton' cannot run selective_scan on cpu torch.float64: float64 runs on"):
        selective_scan(**inputs, backend="triton")
