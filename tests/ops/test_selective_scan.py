"""The selective scan: the original's numbers, gradients, kinds of input, registration with torch, bad input."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import assert_close, assert_same_gradients, golden_names, gradients, load_golden, make_scan_inputs
from tests.ops.conformance import check_golden_scan
from vim.ops import available_backends, causal_conv1d, selective_scan
from vim.ops.selective_scan import chunked, reference

BACKENDS = available_backends("selective_scan")
CASES = golden_names("scan")
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def test_all_golden_cases_are_there():
    assert len(CASES) == 17


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_golden(case, backend):
    check_golden_scan(case, backend)


def _page(inputs: dict[str, torch.Tensor], softplus: bool, reverse: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.selective_scan(*(inputs.get(name) for name in NAMES), softplus, reverse)


@pytest.mark.parametrize("case", CASES)
def test_golden_in_float64(case):
    metadata, tensors = load_golden("scan", case)
    inputs = {
        key[3:]: tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
        for key, tensor in tensors.items()
        if key.startswith("in.")
    }
    softplus = metadata["delta_softplus"] == "true"
    for out in (_page(inputs, softplus)[0], selective_scan(**inputs, delta_softplus=softplus, backend="reference")):
        assert out.dtype == torch.float64
        assert_close(out, tensors["out64"], 1e-10, "out")


def _kinds(seqlen: int) -> dict[str, dict[str, torch.Tensor | None]]:
    """Changes to `make_scan_inputs(2, 4, seqlen, 3)` that cover the kinds of input."""
    rng = torch.Generator().manual_seed(3)

    def normal(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=dtype)

    complex_A = torch.complex(-torch.rand(4, 3, generator=rng, dtype=torch.float64), normal(4, 3))
    return {
        "plain": {},
        "bare": {"D": None, "z": None, "delta_bias": None},
        "grouped": {"B": normal(2, 2, 3, seqlen), "C": normal(2, 4, 3, seqlen)},
        "constant": {"B": normal(4, 3), "C": normal(4, 3)},
        "mixed": {"B": normal(4, 3), "C": normal(2, 1, 3, seqlen)},
        "complex": {"A": complex_A, "B": normal(2, 3, 2 * seqlen), "C": normal(2, 2, 3, 2 * seqlen)},
        "complex constant": {
            "A": complex_A,
            "B": normal(4, 3, dtype=torch.complex128),
            "C": normal(4, 3, dtype=torch.complex128),
        },
    }


# Each kind with each length of a chunk, and every pair of the other settings: (kind, chunk, reverse, softplus, tokens).
PAIRS = [
    (kind, every, (i + j) % 2 == 1, ((i + 1) // 2 + (j > 0)) % 2 == 1, 1 if j == 0 else 5)
    for i, kind in enumerate(_kinds(5))
    for j, every in enumerate((1, 2, 64))
]


@pytest.mark.parametrize(("kind", "every", "reverse", "softplus", "seqlen"), PAIRS)
def test_chunks_equal_the_loop_over_tokens(kind, every, reverse, softplus, seqlen):
    """Values, and gradients of out and last state: written by hand in the op, from autograd in the loop."""
    inputs = {**make_scan_inputs(2, 4, seqlen, 3, dtype=torch.float64), **_kinds(seqlen)[kind]}
    inputs = {name: t.detach().requires_grad_() for name, t in inputs.items() if t is not None}
    arguments = [inputs.get(name) for name in NAMES]
    actual = torch.ops.vim.selective_scan_reference(*arguments, softplus, reverse, every)[:2]
    expected = _page(inputs, softplus, reverse)
    cotangents = [torch.randn(t.shape, generator=torch.Generator().manual_seed(1), dtype=t.dtype) for t in expected]
    actual_grads = torch.autograd.grad(actual, list(inputs.values()), cotangents)
    expected_grads = torch.autograd.grad(expected, list(inputs.values()), cotangents)
    names = ("out", "last_state", *inputs)
    for name, got, wanted in zip(names, (*actual, *actual_grads), (*expected, *expected_grads), strict=True):
        assert_close(got, wanted, 1e-12, name)


def test_backward_memory_does_not_grow_with_the_length():
    """The largest tensor of the backward pass holds one chunk's states, not the sequence's."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() == 4 * tensor.numel():
                    self.numel = max(self.numel, tensor.numel())
            return result

    batch, dim, seqlen, d_state, every = 2, 64, 512, 16, 32
    inputs = [tensor.detach() for tensor in make_scan_inputs(batch, dim, seqlen, d_state).values()]
    _, _, checkpoints = chunked.selective_scan(*inputs, True, False, every)
    with Largest() as largest:
        chunked.selective_scan_backward(torch.ones_like(inputs[0]), None, *inputs, checkpoints, True, False, every)
    assert 0 < largest.numel <= batch * dim * d_state * every


def test_gradient_where_only_the_backward_is_run_with_gradients():
    """A graph that was recorded without entry states makes them when they are needed."""
    inputs = list(make_scan_inputs(2, 4, 70, 3, dtype=torch.float64).values())
    lazy = torch.ops.vim.selective_scan(*inputs, True, False, 0)[0]
    eager = torch.ops.vim.selective_scan(*inputs, True, False, 16)[0]
    assert_same_gradients(lazy, eager, inputs, 1e-12)


def test_flops():
    inputs = make_scan_inputs(2, 4, 37, 3)
    with FlopCounterMode(display=False) as counter:
        out = selective_scan(**inputs, delta_softplus=True)
    assert counter.get_total_flops() == 9 * 2 * 4 * 37 * 3
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 3 * 9 * 2 * 4 * 37 * 3


BAD_INPUTS = {
    "u of two axes": ({"u": torch.zeros(4, 5)}, ValueError, r"u must be \(batch, dim, len\).*\(4, 5\)"),
    "u of integers": ({"u": torch.zeros(2, 4, 5, dtype=torch.int64)}, TypeError, r"u must be float32.*torch.int64"),
    "u is a list": ({"u": [1.0]}, TypeError, r"u must be a tensor.*list"),
    "no tokens": ({"u": torch.zeros(2, 4, 0)}, ValueError, "u must have at least one token"),
    "delta too short": ({"delta": torch.zeros(2, 4, 4)}, ValueError, r"delta .*\(2, 4, 5\).*\(2, 4, 4\)"),
    "delta of another dtype": (
        {"delta": torch.zeros(2, 4, 5, dtype=torch.float16)},
        ValueError,
        "delta.*torch.float32.*torch.float16",
    ),
    "delta on another device": ({"delta": torch.zeros(2, 4, 5, device="meta")}, ValueError, "delta.*device.*cpu.*meta"),
    "A of another width": ({"A": torch.zeros(3, 3)}, ValueError, r"A must be .*dim = 4.*\(3, 3\)"),
    "A without states": ({"A": torch.zeros(4, 0)}, ValueError, r"A must be .*\(4, 0\)"),
    "A of integers": ({"A": torch.zeros(4, 3, dtype=torch.int32)}, TypeError, "A must be floating.*torch.int32"),
    "A is None": ({"A": None}, TypeError, "A must be a tensor.*NoneType"),
    "B of another state size": ({"B": torch.zeros(2, 2, 5)}, ValueError, r"B .*\(2, 3, 5\).*\(2, 2, 5\)"),
    "B with groups that do not divide": ({"B": torch.zeros(2, 3, 3, 5)}, ValueError, "B must have groups.*4.*3"),
    "B of one axis": ({"B": torch.zeros(5)}, ValueError, r"B must be .*\(5,\)"),
    "constant B of another size": ({"B": torch.zeros(3, 4)}, ValueError, r"B .*\(4, 3\).*\(3, 4\)"),
    "C constant and complex for a real A": (
        {"C": torch.zeros(4, 3, dtype=torch.complex64)},
        TypeError,
        "C must be floating.*complex64",
    ),
    "D of another size": ({"D": torch.zeros(5)}, ValueError, r"D .*\(4,\).*\(5,\)"),
    "z of another size": ({"z": torch.zeros(2, 4, 6)}, ValueError, r"z .*\(2, 4, 5\).*\(2, 4, 6\)"),
    "delta_bias of integers": (
        {"delta_bias": torch.zeros(4, dtype=torch.int32)},
        TypeError,
        "delta_bias must be float32.*int32",
    ),
    "unknown backend": ({"backend": "fast"}, ValueError, "backend must be one of.*'fast'"),
}


@pytest.mark.parametrize("what", list(BAD_INPUTS))
def test_bad_input(what):
    changes, error, message = BAD_INPUTS[what]
    with pytest.raises(error, match=message):
        selective_scan(**{**make_scan_inputs(2, 4, 5, 3), **changes})


def test_empty_batch():
    inputs = make_scan_inputs(0, 4, 5, 3)
    out = selective_scan(**inputs, delta_softplus=True)
    assert out.shape == (0, 4, 5)
    assert all(torch.count_nonzero(g) == 0 for g in gradients(out, list(inputs.values())))


@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_one_input(name):
    inputs = {**make_scan_inputs(2, 4, 70, 3, dtype=torch.float64), "B": torch.randn(2, 2, 3, 70).double()}
    rows = torch.stack([inputs[name], 2 * inputs[name]])

    def loss(value: torch.Tensor, others: dict[str, torch.Tensor]) -> torch.Tensor:
        return selective_scan(**{**others, name: value}, delta_softplus=True).square().sum()

    both = torch.func.grad(loss, argnums=(0, 1))
    batched = torch.func.vmap(both, in_dims=(0, None))(rows, inputs)
    for i, row in enumerate(rows):
        own, others = both(row, inputs)
        assert_close(batched[0][i], own, 1e-12)
        for key, expected in others.items():
            assert_close(batched[1][key][i], expected, 1e-12, key)


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_vmap_of_the_convolution_over_one_input(name):
    inputs = {"x": torch.randn(2, 6, 9), "weight": torch.randn(6, 3), "bias": torch.randn(6)}
    rows = torch.stack([inputs[name], 2 * inputs[name]])

    def loss(value: torch.Tensor) -> torch.Tensor:
        return causal_conv1d(**{**inputs, name: value}, activation="silu").square().sum()

    batched = torch.func.vmap(torch.func.grad(loss))(rows)
    for found, row in zip(batched, rows, strict=True):
        assert_close(found, torch.func.grad(loss)(row), 1e-5)
