"""Initial states and several sequences in a row, in the scan and in the convolution: parts equal the whole."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from tests.helpers import TOLERANCES, assert_close, assert_same_gradients, make_scan_inputs
from tests.ops.conformance import noise
from vim.ops import (
    available_backends,
    causal_conv1d,
    default_backend,
    exportable_ops,
    selective_scan,
    unavailable_backends,
)
from vim.ops.selective_scan import reference

SCANS, CONVOLUTIONS = available_backends("segmented_scan"), available_backends("segmented_conv1d")
# The tokens of a row, sequence by sequence. An index may occur again, also in the next sequence but one.
LENGTHS, INDICES = (3, 1, 1, 70, 2, 13), (5, 0, 5, -1, 2**31 - 1, 0)
both_ways = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def make_seq_idx(batch: int, lengths: Sequence[int] = LENGTHS) -> Tensor:
    """Indices of sequences of these lengths, in the other order in every second row."""
    row = torch.repeat_interleave(torch.tensor(INDICES[: len(lengths)]), torch.tensor(lengths)).int()
    return torch.stack([row if i % 2 == 0 else row.flip(0) for i in range(batch)])


def _rows_of(seq_idx: Tensor, b: int) -> list[slice]:
    """Where the sequences of a row are."""
    cuts = [0, *(1 + (seq_idx[b, 1:] != seq_idx[b, :-1]).nonzero().flatten()).tolist(), seq_idx.shape[1]]
    return [slice(first, last) for first, last in itertools.pairwise(cuts)]


def _inputs(seqlen: int, dtype: torch.dtype = torch.float32, d_state: int = 5) -> dict[str, Tensor]:
    inputs = make_scan_inputs(2, 6, seqlen, d_state, dtype)
    return {**inputs, "initial_state": noise(2, 6, d_state, dtype=dtype, seed=4).requires_grad_()}


def _part(inputs: dict[str, Tensor], tokens: slice, rows: slice = slice(None), **changes: Any) -> dict[str, Any]:
    """Some tokens of some rows."""
    own = {n: t[rows, ..., tokens] if n in ("u", "delta", "z", "B", "C") else t for n, t in inputs.items()}
    return {**own, "initial_state": inputs["initial_state"][rows], **changes}


SETTINGS = {"delta_softplus": True, "return_last_state": True}


@both_ways
@pytest.mark.parametrize("backend", SCANS)
@pytest.mark.parametrize("cut", [1, 64, 90])
def test_two_halves_equal_the_whole(cut, backend, reverse):
    inputs = _inputs(91)
    scan = functools.partial(selective_scan, **SETTINGS, reverse=reverse, backend=backend)
    parts = [slice(cut), slice(cut, None)][:: -1 if reverse else 1]

    def halves() -> tuple[Tensor, Tensor]:
        first, state = scan(**_part(inputs, parts[0]))
        second, last_state = scan(**_part(inputs, parts[1], initial_state=state))
        return torch.cat([second, first] if reverse else [first, second], -1), last_state

    tolerance = TOLERANCES[torch.float32]
    for got, wanted in zip(halves(), scan(**inputs), strict=True):
        assert_close(got, wanted, tolerance.value)
    of_the_state = [t for n, t in inputs.items() if n not in "CDz"]
    assert_same_gradients(halves()[0], scan(**inputs)[0], list(inputs.values()), tolerance.gradient)
    assert_same_gradients(halves()[1], scan(**inputs)[1], of_the_state, tolerance.gradient)
    assert_same_gradients(_joined(halves()), _joined(scan(**inputs)), list(inputs.values()), tolerance.gradient)


def _joined(results: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in results])


@both_ways
@pytest.mark.parametrize("backend", SCANS)
def test_sequences_in_a_row_equal_each_alone(backend, reverse):
    """Values, gradients of all inputs, and the last state, which belongs to the last sequence of the scan."""
    seq_idx = make_seq_idx(2)
    inputs = _inputs(seq_idx.shape[1])
    scan = functools.partial(selective_scan, **SETTINGS, reverse=reverse, backend=backend)
    packed, last_state = scan(**inputs, seq_idx=seq_idx)
    rows, states = [], []
    for b in range(2):
        sequences, found = _rows_of(seq_idx, b), []
        for i, tokens in enumerate(sequences[:: -1 if reverse else 1]):
            own = _part(inputs, tokens, slice(b, b + 1))
            out, state = scan(**own if i == 0 else {**own, "initial_state": None})
            found.append(out)
        rows.append(torch.cat(found[:: -1 if reverse else 1], -1))
        states.append(state)
    tolerance = TOLERANCES[torch.float32]
    assert_close(packed, torch.cat(rows), tolerance.value)
    assert_close(last_state, torch.cat(states), tolerance.value)
    alone = _joined([torch.cat(rows), *states])
    assert_same_gradients(_joined([packed, last_state]), alone, list(inputs.values()), tolerance.gradient)


@both_ways
@pytest.mark.parametrize("backend", CONVOLUTIONS)
@pytest.mark.parametrize("width", [1, 2, 4, 7])
def test_convolved_sequences_in_a_row_equal_each_alone(width, backend, reverse):
    seq_idx = make_seq_idx(2)
    x, weight, bias = (noise(*s).requires_grad_() for s in ((2, 6, seq_idx.shape[1]), (6, width), (6,)))
    before = noise(2, 6, width - 1, seed=3).requires_grad_()
    convolve = functools.partial(
        causal_conv1d, weight=weight, bias=bias, activation="silu", reverse=reverse, backend=backend
    )
    packed, final = convolve(x, seq_idx=seq_idx, initial_states=before, return_final_states=True)
    rows, states = [], []
    for b in range(2):
        sequences, found = _rows_of(seq_idx, b), []
        for i, tokens in enumerate(sequences[:: -1 if reverse else 1]):
            initial = before[b : b + 1] if i == 0 else None
            out, state = convolve(x[b : b + 1, :, tokens], initial_states=initial, return_final_states=True)
            found.append(out)
        rows.append(torch.cat(found[:: -1 if reverse else 1], -1))
        states.append(state)
    tolerance = TOLERANCES[torch.float32]
    assert_close(packed, torch.cat(rows), tolerance.value)
    assert torch.equal(final, torch.cat(states))
    leaves = [x, weight, bias, before] if width > 1 else [x, weight, bias]
    assert_same_gradients(packed, torch.cat(rows), leaves, tolerance.gradient)


@both_ways
@pytest.mark.parametrize("backend", CONVOLUTIONS)
@pytest.mark.parametrize(("cut", "channel_last"), [(1, True), (2, False), (8, True)])
def test_two_convolved_halves_equal_the_whole(cut, channel_last, backend, reverse):
    x, weight, bias = (noise(*s).requires_grad_() for s in ((2, 9, 6), (6, 4), (6,)))
    before = noise(2, 6, 3, seed=3).requires_grad_()
    x = x.mT if channel_last else x.mT.contiguous()
    convolve = functools.partial(
        causal_conv1d, weight=weight, bias=bias, activation="silu", reverse=reverse, backend=backend,
        return_final_states=True,
    )  # fmt: skip
    parts = [x[..., :cut], x[..., cut:]][:: -1 if reverse else 1]
    first, state = convolve(parts[0], initial_states=before)
    second, last_state = convolve(parts[1], initial_states=state)
    whole, final = convolve(x, initial_states=before)
    assert (whole.mT if channel_last else whole).is_contiguous()
    halves = torch.cat([second, first] if reverse else [first, second], -1)
    assert_close(halves, whole, TOLERANCES[torch.float32].value)
    assert torch.equal(final, last_state)
    results = (_joined(pair) for pair in ((halves, last_state), (whole, final)))
    assert_same_gradients(*results, [x, weight, bias, before], TOLERANCES[torch.float32].gradient)


def test_final_states_are_a_copy_or_the_tensor_that_was_given():
    x, weight, given = noise(2, 3, 5), noise(3, 4), torch.full((2, 3, 3), torch.nan)
    out, states = causal_conv1d(x, weight, return_final_states=True, final_states_out=given)
    assert states is given
    assert torch.equal(given, x[..., 2:])
    assert torch.equal(out, causal_conv1d(x, weight))
    before = x.clone()
    causal_conv1d(x, weight, return_final_states=True)[1].zero_()
    assert torch.equal(x, before)
    short = causal_conv1d(x[..., :2], weight, return_final_states=True)[1]
    assert torch.equal(short, torch.nn.functional.pad(x[..., :2], (1, 0)))


@both_ways
@pytest.mark.parametrize("backend", SCANS)
def test_what_is_not_finite_stays_in_its_sequence(backend, reverse):
    seq_idx = make_seq_idx(1, (5, 60, 20))
    inputs = {n: t[:1] if n not in ("A", "D", "delta_bias") else t for n, t in _inputs(85).items()}
    for spoil in (torch.nan, torch.inf):
        spoiled = inputs["u"].detach().clone()
        spoiled[..., 30] = spoil
        leaf = spoiled.requires_grad_()
        for run in (
            lambda u: selective_scan(
                **{**inputs, "u": u}, delta_softplus=True, seq_idx=seq_idx, reverse=reverse, backend=backend
            ),
            lambda u: causal_conv1d(u, noise(6, 4), seq_idx=seq_idx, reverse=reverse, backend=backend),
        ):
            out = run(leaf)
            (grad,) = torch.autograd.grad(out.sum(), leaf)
            for result in (out, grad):
                assert torch.isfinite(result[..., :5]).all()
                assert torch.isfinite(result[..., 65:]).all()
            assert not torch.isfinite(out).all()


def _page(inputs: dict[str, Tensor], seq_idx: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    return reference.selective_scan(*(inputs.get(n) for n in names), True, reverse, inputs["initial_state"], seq_idx)


@both_ways
@pytest.mark.parametrize("complex_A", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("every", [1, 3, 64])
def test_chunks_equal_the_loop_over_tokens(every, complex_A, reverse):
    seq_idx = make_seq_idx(2, (3, 1, 6))
    inputs = _inputs(10, torch.float64, 3)
    if complex_A:
        inputs["A"] = torch.complex(inputs["A"].detach(), noise(6, 3).double()).requires_grad_()
        inputs.update({n: noise(2, 3, 20, seed=i).double().requires_grad_() for i, n in enumerate("BC")})
        inputs["initial_state"] = torch.complex(noise(2, 6, 3), noise(2, 6, 3, seed=2)).to(inputs["A"]).requires_grad_()
    actual = torch.ops.vim.segmented_scan_reference(
        *(inputs[n] for n in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")),
        seq_idx, True, reverse, every,
    )[:2]  # fmt: skip
    expected = _page(inputs, seq_idx, reverse)
    cotangents = [torch.randn(t.shape, generator=torch.Generator().manual_seed(1), dtype=t.dtype) for t in expected]
    leaves = list(inputs.values())
    for name, got, wanted in zip(
        ("out", "last_state", *inputs),
        (*actual, *torch.autograd.grad(actual, leaves, cotangents)),
        (*expected, *torch.autograd.grad(expected, leaves, cotangents)),
        strict=True,
    ):
        assert_close(got, wanted, 1e-12, name)


def _gradcheck_scan(seq_idx: Tensor | None, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    return selective_scan(
        *tensors[:8], delta_softplus=True, return_last_state=True, initial_state=tensors[8], seq_idx=seq_idx
    )


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_numerically(check):
    torch.manual_seed(0)
    inputs = [*make_scan_inputs(1, 2, 4, 2, torch.float64).values()]
    inputs.append(torch.randn(1, 2, 2, dtype=torch.float64, requires_grad=True))
    seq_idx = torch.tensor([[0, 0, 1, 1]], dtype=torch.int32)
    assert check(functools.partial(_gradcheck_scan, seq_idx), tuple(inputs))
    assert check(functools.partial(_gradcheck_scan, None), tuple(inputs))
    leaves = tuple(
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((1, 2, 4), (2, 3), (2,), (1, 2, 2))
    )

    def convolve(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        settings = {"seq_idx": seq_idx, "initial_states": before, "return_final_states": True}
        return causal_conv1d(x, weight, bias, "silu", **settings)

    assert check(convolve, leaves)


def _both(u: Tensor, inputs: dict[str, Tensor], seq_idx: Tensor) -> Tensor:
    """A convolution and a scan, with all the forms."""
    settings = {"seq_idx": seq_idx, "return_final_states": True}
    u, states = causal_conv1d(
        u, inputs["D"][:, None].expand(-1, 3), None, "silu", initial_states=u[..., :2], **settings
    )
    y, state = selective_scan(**{**inputs, "u": u}, **SETTINGS, seq_idx=seq_idx)
    return y.sum(-1) + state.sum(-1) + states.sum(-1)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_break(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(_both, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for lengths in ((3, 1, 6), (2, 9)):
        seq_idx = make_seq_idx(2, lengths)
        inputs = _inputs(sum(lengths))
        actual, expected = (f(inputs["u"], inputs, seq_idx) for f in (compiled, _both))
        assert_close(actual, expected, 1e-6)
        assert_same_gradients(actual, expected, list(inputs.values()), 1e-5)


class _Module(torch.nn.Module):
    def forward(self, u: Tensor, inputs: dict[str, Tensor], seq_idx: Tensor) -> Tensor:
        return _both(u, inputs, seq_idx)


def test_exported():
    seq_idx, inputs = make_seq_idx(2, (3, 1, 6)), {n: t.detach() for n, t in _inputs(10).items()}
    arguments = (inputs["u"], inputs, seq_idx)
    program = torch.export.export(_Module(), arguments)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"vim.segmented_scan.default", "vim.segmented_conv1d.default"} <= targets
    assert_close(program.module()(*arguments), _both(*arguments), 1e-6)


def test_made_of_operators_that_exporters_know():
    seq_idx, inputs = make_seq_idx(2, (3, 1, 6)), {n: t.detach() for n, t in _inputs(10).items()}
    with exportable_ops():
        actual = _both(inputs["u"], inputs, seq_idx)
    assert_close(actual, _both(inputs["u"], inputs, seq_idx), 1e-6)


@pytest.mark.parametrize("name", ["u", "initial_state"])
def test_vmap(name):
    seq_idx, inputs = make_seq_idx(2, (3, 1, 6)), _inputs(10, torch.float64)

    def loss(value: Tensor) -> Tensor:
        changed = {**inputs, name: value}
        return _both(changed["u"], changed, seq_idx).square().sum()

    rows = torch.stack([inputs[name], 2 * inputs[name]])
    for found, row in zip(torch.func.vmap(torch.func.grad(loss))(rows), rows, strict=True):
        assert_close(found, torch.func.grad(loss)(row), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_states_in_float32(dtype):
    inputs = _inputs(91, dtype)
    out, state = selective_scan(**inputs, **SETTINGS)
    assert (out.dtype, state.dtype) == (dtype, torch.float32)
    expected = selective_scan(**{n: t.double() for n, t in inputs.items()}, **SETTINGS)
    assert_close(out, expected[0], TOLERANCES[dtype].value)
    assert_close(state, expected[1], TOLERANCES[torch.float32].value)


def test_a_backend_without_these_forms_is_passed_over_or_raises():
    reasons = unavailable_backends("segmented_scan", "cuda")
    assert reasons["mamba_ssm"] == "it has no kernel for segmented_scan"
    inputs = _inputs(9)
    with (
        default_backend("mamba_ssm"),
        pytest.raises(RuntimeError, match="'mamba_ssm' cannot run segmented_scan on cpu"),
    ):
        selective_scan(**inputs)


SCAN_ERRORS = {
    "initial state of another size": (
        {"initial_state": torch.zeros(2, 6, 4)}, ValueError, r"initial_state must be .* = \(2, 6, 5\), got \(2, 6, 4\)",
    ),
    "a complex initial state": (
        {"initial_state": torch.zeros(2, 6, 5, dtype=torch.complex64)}, TypeError, "must be floating as A",
    ),
    "an initial state on another device": (
        {"initial_state": torch.zeros(2, 6, 5, device="meta")}, ValueError, "initial_state must be on the device of u",
    ),
    "no tensor": ({"initial_state": 0.0}, TypeError, "initial_state must be a tensor.*float"),
    "indices of another length": (
        {"seq_idx": torch.zeros(2, 8, dtype=torch.int32)}, ValueError, r"seq_idx must be .* \(2, 9\), got \(2, 8\)",
    ),
    "indices of 64 bits": ({"seq_idx": torch.zeros(2, 9, dtype=torch.int64)}, TypeError, "seq_idx must be int32, got"),
    "indices that are no integers": ({"seq_idx": torch.zeros(2, 9)}, TypeError, "seq_idx must be int32, got"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(SCAN_ERRORS))
def test_bad_input_of_the_scan(what):
    changes, error, message = SCAN_ERRORS[what]
    with pytest.raises(error, match=message):
        selective_scan(**{**_inputs(9), **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"initial_states": torch.zeros(2, 5, 2)},
            ValueError,
            r"initial_states must be .*\(2, 5, 3\), got \(2, 5, 2\)",
        ),
        ({"seq_idx": torch.zeros(1, 7).int()}, ValueError, r"seq_idx must be .*\(2, 7\), got \(1, 7\)"),
        ({"final_states_out": torch.zeros(2, 5, 3)}, ValueError, "final_states_out must be None where return_final"),
        (
            {"final_states_out": torch.zeros(2, 3, 5), "return_final_states": True},
            ValueError,
            r"final_states_out must be .*\(2, 5, 3\), got \(2, 3, 5\)",
        ),
    ],
)
def test_bad_input_of_the_convolution(changes, error, message):
    with pytest.raises(error, match=message):
        causal_conv1d(torch.zeros(2, 5, 7), torch.zeros(5, 4), **changes)
