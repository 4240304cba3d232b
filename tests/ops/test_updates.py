"""One token after the other: `causal_conv1d_update` and `selective_state_update` equal the ops over the whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import TOLERANCES, assert_close, assert_same_gradients
from tests.ops.conformance import noise
from vim.ops import (
    available_backends,
    causal_conv1d,
    causal_conv1d_update,
    selective_scan,
    selective_state_update,
)

BATCH, DIM, WIDTH, SEQLEN = 3, 5, 4, 11
F32 = TOLERANCES[torch.float32]


def _filter(width: int = WIDTH) -> tuple[Tensor, Tensor, str]:
    return noise(DIM, width, seed=2), noise(DIM, seed=3), "silu"


# ---- convolution -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", available_backends("causal_conv1d"))
@pytest.mark.parametrize("state_len", [3, 4, 9])
@pytest.mark.parametrize("pieces", [(1,) * SEQLEN, (3, 1, 7), (11,)], ids=str)
@pytest.mark.parametrize("circular", [False, True])
def test_pieces_equal_the_whole(circular, pieces, state_len, backend):
    x, state, start = noise(BATCH, DIM, SEQLEN), torch.zeros(BATCH, DIM, state_len), 0
    outputs = []
    for length in pieces:
        piece = x[..., start : start + length]
        seqlens = torch.full((BATCH,), start, dtype=torch.int32) if circular else None
        piece = piece[..., 0] if length == 1 else piece
        out = causal_conv1d_update(piece, state, *_filter(), seqlens, backend=backend)
        assert out.shape == piece.shape
        outputs.append(out.view(BATCH, DIM, length))
        start += length
    assert_close(torch.cat(outputs, -1), causal_conv1d(x, *_filter()), F32.value)
    last = F.pad(x, (state_len, 0))[..., -state_len:]
    expected = last.roll(SEQLEN % state_len, -1) if circular else last
    assert torch.equal(state, expected)


def test_a_circular_buffer_where_each_sequence_has_its_own_length():
    x, seqlens = noise(BATCH, DIM, SEQLEN), torch.tensor([0, 4, 7])
    state = torch.zeros(BATCH, DIM, 6)
    for b, seen in enumerate(seqlens.tolist()):
        for token in range(seen):
            state[b, :, token % 6] = x[b, :, token]
    new = torch.stack([x[b, :, seen : seen + 2] for b, seen in enumerate(seqlens.tolist())])
    out = causal_conv1d_update(new, state, *_filter(), seqlens)
    whole = causal_conv1d(x, *_filter())
    for b, seen in enumerate(seqlens.tolist()):
        assert_close(out[b], whole[b, :, seen : seen + 2], F32.value)
        assert torch.equal(state[b, :, (seen + 1) % 6], x[b, :, seen + 1])


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("indices", [[4, 0, 2], [4, -1, 2], [-1, 4, 0], [-1, -1, -1]], ids=str)
def test_rows_of_a_larger_state(indices, circular):
    """Rows that are not asked for, and padding, change nothing."""
    state, x = noise(6, DIM, 4, seed=5), noise(BATCH, DIM, 2)
    seqlens = torch.tensor([3, 8, 1]) if circular else None
    expected_state, expected = state.clone(), torch.zeros_like(x)
    for i, row in enumerate(indices):
        if row >= 0:
            own = None if seqlens is None else seqlens[i : i + 1]
            expected[i] = causal_conv1d_update(x[i : i + 1], expected_state[row : row + 1], *_filter(), own)[0]
    out = causal_conv1d_update(x, state, *_filter(), seqlens, torch.tensor(indices, dtype=torch.int32))
    assert_close(out, expected, F32.value)
    assert torch.equal(state, expected_state)


def test_a_filter_of_one_tap_and_a_state_of_another_dtype():
    x, state = noise(BATCH, DIM).bfloat16(), torch.zeros(BATCH, DIM, 2)
    out = causal_conv1d_update(x, state, noise(DIM, 1, seed=2))
    assert out.dtype == torch.bfloat16
    assert torch.equal(state[..., 1], x.float())
    assert_close(out, causal_conv1d(x[..., None], noise(DIM, 1, seed=2))[..., 0], TOLERANCES[torch.bfloat16].value)


def test_gradients_of_updates():
    x, weight, bias = noise(BATCH, DIM, SEQLEN).requires_grad_(), *(t.requires_grad_() for t in _filter()[:2])
    state = torch.zeros(BATCH, DIM, 3)
    steps = [causal_conv1d_update(x[..., i], state, weight, bias, "silu") for i in range(SEQLEN)]
    whole = causal_conv1d(x, weight, bias, "silu")
    assert_same_gradients(torch.stack(steps, -1), whole, [x, weight, bias], F32.gradient)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(3)}, ValueError, r"x must be \(batch, dim, len\), got shape \(3,\)"),
        ({"conv_state": torch.zeros(3, 5, 2)}, ValueError, r"conv_state must have state_len .* = 3, got \(3, 5, 2\)"),
        ({"conv_state": torch.zeros(2, 5, 3)}, ValueError, r"conv_state must be .*\(3, 5, 3\), got \(2, 5, 3\)"),
        ({"conv_state": torch.zeros(3, 5)}, ValueError, r"conv_state must be .*, got \(3, 5\)"),
        ({"conv_state": None}, TypeError, "conv_state must be a tensor"),
        ({"cache_seqlens": torch.zeros(2).int()}, ValueError, r"cache_seqlens must be \(batch,\) = \(3,\), got \(2,\)"),
        ({"cache_seqlens": torch.zeros(3)}, TypeError, "cache_seqlens must be int32 or int64, got torch.float32"),
        ({"conv_state_indices": torch.zeros(3, 1).int()}, ValueError, r"conv_state_indices must be .*\(3, 1\)"),
        ({"activation": "relu"}, ValueError, "activation must be one of"),
    ],
)
def test_bad_input_of_the_convolution(changes, error, message):
    good = {"x": torch.zeros(3, 5), "conv_state": torch.zeros(3, 5, 3), "weight": torch.zeros(5, 4)}
    with pytest.raises(error, match=message):
        causal_conv1d_update(**{**good, **changes})


# ---- scan --------------------------------------------------------------------------------------------------------


def _operands(dtype: torch.dtype = torch.float32, states: int = 6, groups: int | None = None) -> dict[str, Tensor]:
    """Operands of a scan (batch, dim, len)."""
    maps = (BATCH, states, SEQLEN) if groups is None else (BATCH, groups, states, SEQLEN)
    tensors = {
        "u": noise(BATCH, 12, SEQLEN, dtype=dtype),
        "delta": noise(BATCH, 12, SEQLEN, dtype=dtype, seed=1),
        "A": -noise(12, states, seed=2).abs(),
        "B": noise(*maps, dtype=dtype, seed=3),
        "C": noise(*maps, dtype=dtype, seed=4),
        "D": noise(12, seed=5),
        "z": noise(BATCH, 12, SEQLEN, dtype=dtype, seed=6),
        "delta_bias": noise(12, seed=7),
    }
    return {name: t.requires_grad_() for name, t in tensors.items()}


def _steps(state: Tensor, operands: dict[str, Tensor], backend: str | None, heads: int | None = None) -> Tensor:
    def split(t: Tensor, axis: int) -> Tensor:
        return t if heads is None else t.unflatten(axis, (heads, -1))

    A, D, bias = (split(operands[n], 0) for n in ("A", "D", "delta_bias"))
    outputs = []
    for i in range(SEQLEN):
        x, dt, z = (split(operands[n][..., i], 1) for n in ("u", "delta", "z"))
        out = selective_state_update(
            state, x, dt, A, operands["B"][..., i], operands["C"][..., i], D, z, bias, True, backend=backend
        )
        assert out.shape == x.shape
        outputs.append(out.flatten(1))
    return torch.stack(outputs, -1)


@pytest.mark.parametrize("backend", available_backends("segmented_scan"))
@pytest.mark.parametrize("heads", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_the_scan(dtype, heads, backend):
    operands = _operands(dtype, groups=None if heads is None else 2)
    shape = (BATCH, 12, 6) if heads is None else (BATCH, heads, 3, 6)
    state = torch.zeros(shape)
    out = _steps(state, operands, backend, heads)
    expected, last_state = selective_scan(**operands, delta_softplus=True, return_last_state=True)
    assert out.dtype == dtype
    assert_close(out, expected, TOLERANCES[dtype].value)
    assert_close(state.view(BATCH, 12, 6), last_state, F32.value)
    leaves = list(operands.values())
    ours, whole = (torch.cat([y.flatten(), h.flatten()]) for y, h in ((out, state), (expected, last_state)))
    assert_same_gradients(ours, whole, leaves, 3 * TOLERANCES[dtype].gradient)


def test_a_bare_step_in_place_of_a_view():
    """No skip, gate, bias or softplus; the state is a part of a larger tensor, in half precision."""
    cache = torch.zeros(2, BATCH, 12, 6, dtype=torch.bfloat16)
    o = {name: t.detach() for name, t in _operands().items()}
    arguments = (o["u"][..., 0], o["delta"][..., 0].abs(), o["A"], o["B"][..., 0], o["C"][..., 0])
    out = selective_state_update(cache[1], *arguments)
    x, dt, _, B, C = arguments
    state = dt[..., None] * B[:, None] * x[..., None]
    assert_close(out, (state * C[:, None]).sum(-1), F32.value)
    assert_close(cache[1], state, TOLERANCES[torch.bfloat16].value)
    assert torch.count_nonzero(cache[0]) == 0


def test_operands_of_several_dtypes():
    """A step size that is kept in float32 is not rounded to the dtype of x."""
    o = {name: t.detach()[..., 0] for name, t in _operands().items() if t.dim() == 3}
    A = _operands()["A"].detach()
    x, states = o["u"].bfloat16(), (torch.zeros(BATCH, 12, 6), torch.zeros(BATCH, 12, 6))
    out = selective_state_update(states[0], x, o["delta"], A, o["B"], o["C"])
    expected = selective_state_update(states[1], x.float(), o["delta"], A, o["B"], o["C"])
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected.bfloat16())
    assert torch.equal(*states)


def test_compiled_without_a_break():
    torch._dynamo.reset()

    def token(x: Tensor, conv_state: Tensor, state: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> Tensor:
        u = causal_conv1d_update(x, conv_state, weight, None, "silu", conv_state_indices=rows)
        return selective_state_update(state, u, dt, A, B, B, dt_softplus=True)

    weight, rows = noise(12, 4), torch.tensor([2, 0, 1])
    o = {name: t.detach()[..., 0] for name, t in _operands().items() if t.dim() == 3}
    results = []
    for run in (token, torch.compile(token, fullgraph=True, backend="aot_eager")):
        states = torch.zeros(BATCH, 12, 3), torch.zeros(BATCH, 12, 6)
        for _ in range(2):
            out = run(o["u"], *states, o["delta"], _operands()["A"].detach(), o["B"])
        results.append((out, *states))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, 1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"state": torch.zeros(3, 12)}, ValueError, r"state must be .*, got shape \(3, 12\)"),
        ({"state": torch.zeros(3, 12, 6).int()}, TypeError, "state must be float32"),
        ({"x": torch.zeros(3, 11)}, ValueError, r"x must be \(batch, dim\) = \(3, 12\), got \(3, 11\)"),
        ({"dt": torch.zeros(3, 12, 1)}, ValueError, r"dt must be .*\(3, 12\), got \(3, 12, 1\)"),
        ({"A": torch.zeros(12, 5)}, ValueError, r"A must be \(dim, d_state\) = \(12, 6\), got \(12, 5\)"),
        ({"B": torch.zeros(3, 2, 6)}, ValueError, r"B must be \(batch, d_state\) = \(3, 6\), got \(3, 2, 6\)"),
        ({"D": torch.zeros(3)}, ValueError, r"D must be \(dim,\) = \(12,\), got \(3,\)"),
        ({"z": torch.zeros(3, 12, device="meta")}, ValueError, "z must be on the device of state, cpu, got meta"),
    ],
)
def test_bad_input_of_the_scan(changes, error, message):
    x = torch.zeros(3, 12)
    good = {"state": torch.zeros(3, 12, 6), "x": x, "dt": x, "A": torch.zeros(12, 6), **dict.fromkeys("BC", x[:, :6])}
    with pytest.raises(error, match=message):
        selective_state_update(**{**good, **changes})


def test_bad_groups_of_heads():
    x, A, B = torch.zeros(3, 4, 3), torch.zeros(4, 3, 6), torch.zeros(3, 3, 6)
    with pytest.raises(ValueError, match="B must have ngroups that divide nheads = 4, got 3 groups"):
        selective_state_update(torch.zeros(3, 4, 3, 6), x, x, A, B, B)
