"""A layer in one op: values and gradients of its reference, on every backend, however it is called."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.helpers import TOLERANCES, assert_close
from tests.ops.conformance import by_threads
from vim.ops import BlockWeights, available_backends, bidirectional_block

NAMES = BlockWeights._fields
SIZES = [  # batch, len, d_model, d_inner, dt_rank, d_state, d_conv
    (2, 37, 24, 48, 2, 16, 4),
    (1, 1, 13, 26, 3, 5, 4),
    (3, 130, 16, 32, 1, 3, 2),
    (1, 65, 192, 384, 12, 16, 4),
]


def make_weights(
    d_model: int = 12,
    d_inner: int = 24,
    dt_rank: int = 2,
    d_state: int = 4,
    d_conv: int = 4,
    biases: bool = True,
    dtype: torch.dtype = torch.float32,
) -> BlockWeights:
    """Random weights that keep activations near one, as leaves that require gradients."""
    rng = torch.Generator().manual_seed(3)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=rng, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    def direction() -> list[torch.Tensor | None]:
        return [
            normal(d_inner, 1, d_conv, scale=0.5),
            normal(d_inner) if biases else None,
            normal(dt_rank + 2 * d_state, d_inner, scale=d_inner**-0.5),
            normal(d_inner, dt_rank, scale=dt_rank**-0.5),
            normal(d_inner),
            normal(d_inner, d_state, scale=0.3),
            normal(d_inner),
        ]

    return BlockWeights(
        normal(d_model),
        normal(2 * d_inner, d_model, scale=d_model**-0.5),
        normal(2 * d_inner) if biases else None,
        *direction(),
        *direction(),
        normal(d_model, d_inner, scale=d_inner**-0.5),
        normal(d_model) if biases else None,
    )


def make_inputs(batch: int, length: int, d_model: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(4)
    x, residual = (torch.randn(batch, length, d_model, generator=rng, dtype=torch.float64) for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    return [x.to(dtype).requires_grad_(), residual.to(wide).requires_grad_()]


def present(weights: BlockWeights) -> list[torch.Tensor]:
    return [w for w in weights if w is not None]


def in_float64(tensors: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def both_gradients(outputs: tuple[torch.Tensor, ...], leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(5)
    grads = [torch.randn(y.shape, generator=rng, dtype=torch.float64).to(y.dtype) for y in outputs]
    return torch.autograd.grad(outputs, leaves, grads)


def test_reference_numerically():
    weights = make_weights(4, 6, 2, 3, 3, dtype=torch.float64)
    leaves = [*make_inputs(1, 4, 4, torch.float64), *weights]

    def run(x, residual, *weights):
        return bidirectional_block(x, residual, BlockWeights(*weights), merge="sum")

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("backend", available_backends("bidirectional_block"))
def test_against_float64(backend, sizes, dtype):
    batch, length, *widths = sizes
    biases = length % 2 == 0
    weights = make_weights(*widths, biases=biases, dtype=dtype)
    inputs = make_inputs(batch, length, widths[0], dtype)
    x, residual = inputs if batch > 1 else (inputs[0], None)
    leaves = [*(inputs if batch > 1 else inputs[:1]), *present(weights)]
    outputs = bidirectional_block(x, residual, weights, merge="mean" if biases else "sum", backend=backend)
    assert [y.dtype for y in outputs] == [dtype, torch.float32]
    x64, residual64, *w64 = in_float64([x, residual, *weights])
    leaves64 = [t for t in (x64, residual64, *w64) if t is not None]
    expected = bidirectional_block(x64, residual64, BlockWeights(*w64), merge="mean" if biases else "sum")
    # Five roundings of activations in half precision one after the other, where an op has one.
    value, gradient, *_ = (2.5 * t for t in TOLERANCES[dtype])
    for actual, wanted in zip(outputs, expected, strict=True):
        assert_close(actual, wanted, value)
    actual_grads = both_gradients(outputs, leaves)
    names = [
        *(["x", "residual"][: 1 + (residual is not None)]),
        *(n for n, w in zip(NAMES, weights, strict=True) if w is not None),
    ]
    for name, leaf, got, wanted in zip(names, leaves, actual_grads, both_gradients(expected, leaves64), strict=True):
        assert got.dtype == leaf.dtype
        assert_close(got, wanted, gradient, name)


@pytest.mark.parametrize("backend", available_backends("bidirectional_block"))
def test_one_gradient_alone(backend):
    weights, (x, residual) = make_weights(), make_inputs(2, 7, 12)
    for which in (0, 1):
        got = torch.autograd.grad(
            bidirectional_block(x, residual, weights, backend=backend)[which].square().sum(),
            [x, residual, *present(weights)],
            allow_unused=True,
        )
        x64, residual64, *w64 = in_float64([x, residual, *weights])
        expected = torch.autograd.grad(
            bidirectional_block(x64, residual64, BlockWeights(*w64))[which].square().sum(),
            [x64, residual64, *w64],
            allow_unused=True,
        )
        for actual, wanted in zip(got, expected, strict=True):
            if wanted is None or wanted.abs().max() == 0:
                assert actual is None or actual.abs().max() == 0
            else:
                assert_close(actual, wanted, 2e-5)


def test_the_bits_do_not_depend_on_threads_or_on_gradients():
    weights, inputs = make_weights(64, 128, 4, 16), make_inputs(3, 97, 64)

    def run() -> tuple[torch.Tensor, ...]:
        outputs = bidirectional_block(*inputs, weights)
        with torch.no_grad():
            assert all(map(torch.equal, bidirectional_block(*inputs, weights), outputs))
        return (*outputs, *both_gradients(outputs, [*inputs, *weights]))

    first, *others = by_threads(run)
    for other in others:
        assert all(map(torch.equal, other, first))


@pytest.mark.parametrize("backend", available_backends("bidirectional_block"))
def test_strided_inputs_and_weights(backend):
    weights, (x, residual) = make_weights(), make_inputs(2, 7, 12)
    expected = bidirectional_block(x, residual, weights, backend=backend)
    strided = BlockWeights(
        *(w.detach().mT.contiguous().mT if w.dim() > 1 else w.repeat_interleave(2)[::2] for w in weights)
    )
    apart = torch.stack([x, x], dim=-1)[..., 0], residual.transpose(0, 1).contiguous().transpose(0, 1)
    for actual, wanted in zip(bidirectional_block(*apart, strided, backend=backend), expected, strict=True):
        assert_close(actual, wanted, 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_several_dtypes(name):
    weights, inputs = make_weights(), make_inputs(2, 7, 12)
    expected = bidirectional_block(*inputs, weights)
    half = weights._replace(**{name: getattr(weights, name).detach().bfloat16().requires_grad_()})
    outputs = bidirectional_block(*inputs, half)
    assert_close(outputs[0], expected[0], 0.05)
    (gradient,) = torch.autograd.grad(outputs[0].sum(), [getattr(half, name)])
    assert gradient.dtype == torch.bfloat16


def test_autocast_decides_the_dtype_at_the_door():
    weights, (x, residual) = make_weights(), make_inputs(2, 7, 12)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = bidirectional_block(x, residual, weights)
    assert [y.dtype for y in outputs] == [torch.bfloat16, torch.float32]
    assert torch.equal(outputs[1], (x + residual).detach())
    expected = bidirectional_block(x, residual, weights)
    assert_close(outputs[0], expected[0], 2.5 * TOLERANCES[torch.bfloat16].value)
    for w, got, wanted in zip(
        weights, both_gradients(outputs, weights), both_gradients(expected, weights), strict=True
    ):
        assert got.dtype == w.dtype
        assert_close(got, wanted, 2.5 * TOLERANCES[torch.bfloat16].gradient)


def test_frozen_products_get_no_gradient():
    weights, inputs = make_weights(), make_inputs(2, 7, 12)
    expected = both_gradients(bidirectional_block(*inputs, weights), [*inputs, weights.A_log])
    frozen = BlockWeights(*(w.detach().requires_grad_(n == "A_log") for n, w in zip(NAMES, weights, strict=True)))
    actual = both_gradients(bidirectional_block(*inputs, frozen), [*inputs, frozen.A_log])
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("family", ["", "_reference"])
def test_opcheck(family):
    arguments = (*make_inputs(2, 5, 12), *make_weights(biases=False), torch.float32, 1e-5, 0.5, 64)
    torch.library.opcheck(getattr(torch.ops.vim, f"bidirectional_block{family}").default, arguments)


def test_compiles_and_exports_as_one_op():
    weights, inputs = make_weights(), make_inputs(2, 7, 12)
    expected = bidirectional_block(*inputs, weights)
    compiled = torch.compile(bidirectional_block, fullgraph=True, backend="aot_eager")(*inputs, weights)
    assert all(map(torch.equal, compiled, expected))
    for got, wanted in zip(both_gradients(compiled, weights), both_gradients(expected, weights), strict=True):
        assert_close(got, wanted, 1e-6)

    class Layer(torch.nn.Module):
        def forward(self, x, residual):
            return bidirectional_block(x, residual, BlockWeights(*(w.detach() for w in weights)))

    program = torch.export.export(Layer(), tuple(inputs))
    assert sum("bidirectional_block" in str(node.target) for node in program.graph.nodes) == 1
    assert all(map(torch.equal, program.module()(*inputs), expected))


def test_what_is_kept_for_the_backward_pass():
    """xz, x_dbl, entry states and the residual sum: not the norm, not the convolutions, not y."""
    weights, inputs = make_weights(), make_inputs(2, 130, 12)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        bidirectional_block(*inputs, weights)
    held = sum(size for pointer, size in kept.items() if pointer not in {w.data_ptr() for w in weights})
    tokens = 2 * 130
    numbers = tokens * (12 + 2 * 24 + 2 * (2 + 2 * 4)) + 2 * 2 * 3 * 4 * 24
    assert held == 4 * numbers


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_changed_before_the_backward_pass_is_refused(name):
    weights, inputs = make_weights(), make_inputs(2, 7, 12)
    out, _ = bidirectional_block(*inputs, weights)
    with torch.no_grad():
        getattr(weights, name).mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("way", ["checkpoint", "offload", "func"])
def test_under_others_machinery(way):
    weights, inputs = make_weights(), make_inputs(2, 33, 12)
    leaves = [*inputs, *weights]
    expected = torch.autograd.grad(bidirectional_block(*inputs, weights)[0].square().sum(), leaves)

    def loss(x, residual, *weights):
        return bidirectional_block(x, residual, BlockWeights(*weights))[0].square().sum()

    if way == "func":
        actual = torch.func.grad(loss, argnums=tuple(range(len(leaves))))(*leaves)
    elif way == "checkpoint":
        actual = torch.autograd.grad(checkpoint(loss, *leaves, use_reentrant=False), leaves)
    else:
        with torch.autograd.graph.save_on_cpu():
            total = loss(*leaves)
        actual = torch.autograd.grad(total, leaves)
    for got, wanted in zip(actual, expected, strict=True):
        assert_close(got, wanted, 2e-5)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (
            {"hidden_states": torch.zeros(7, 12)},
            ValueError,
            r"hidden_states must be \(batch, len, d_model\), got shape",
        ),
        ({"hidden_states": torch.zeros(2, 0, 12)}, ValueError, "at least one token"),
        ({"hidden_states": torch.zeros(2, 7, 12).int()}, TypeError, "hidden_states must be float32"),
        ({"residual": torch.zeros(2, 6, 12)}, ValueError, r"residual must be .* = \(2, 7, 12\), got \(2, 6, 12\)"),
        ({"merge": "max"}, ValueError, "merge must be one of"),
        ({"in_proj": torch.zeros(48, 11)}, ValueError, r"weights.in_proj must be .* = \(48, 12\), got \(48, 11\)"),
        ({"x_proj_b": torch.zeros(9, 24)}, ValueError, r"weights.x_proj_b must be .* = \(10, 24\), got \(9, 24\)"),
        ({"A_b_log": torch.zeros(24, 5)}, ValueError, r"weights.A_b_log must be .* = \(24, 4\), got \(24, 5\)"),
        ({"D": None}, TypeError, "weights.D must be a tensor"),
        ({"out_proj": torch.zeros(12)}, ValueError, r"weights.out_proj must be \(d_model, d_inner\)"),
    ],
)
def test_bad_arguments_are_named(change, error, match):
    weights, (x, residual) = make_weights(), make_inputs(2, 7, 12)
    of_weights = {name: value for name, value in change.items() if name in NAMES}
    others = {"hidden_states": x, "residual": residual, **{k: v for k, v in change.items() if k not in NAMES}}
    with pytest.raises(error, match=match):
        bidirectional_block(weights=weights._replace(**of_weights), **others)


@pytest.mark.parametrize("held", [0, 4])
@pytest.mark.parametrize("grad", [False, True])
def test_freed_memory_is_an_error(grad, held):
    count = 2 + len(NAMES)
    for i in range(count):
        tensors = [*make_inputs(2, 7, 12), *make_weights()]
        tensors[i].detach().untyped_storage().resize_(held)
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="freed or cut short"):
            bidirectional_block(tensors[0], tensors[1], BlockWeights(*tensors[2:]))


def test_nothing_is_left_on_after_an_interrupted_call(monkeypatch):
    """No hook, no mode and no default outlives a call that ends in the middle."""
    weights, inputs = make_weights(), make_inputs(2, 7, 12)
    with contextlib.suppress(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        bidirectional_block(*inputs, weights)
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    assert torch._C._len_torch_dispatch_stack() == 0
