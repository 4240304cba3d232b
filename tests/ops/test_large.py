"""Sizes far from a model's: many states, odd widths, long sequences, many channels; time and memory stay in bounds."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from tests.helpers import TOLERANCES, assert_close, assert_same_gradients, make_scan_inputs
from tests.models.test_memory import measure
from tests.ops.conformance import noise
from tests.ops.natives import needs_native
from vim.ops import available_backends, causal_conv1d, selective_scan

# (dim, len, d_state)
SIZES = {"300 states": (13, 9, 300), "80,000 channels": (80_000, 3, 2), "70,000 tokens": (3, 70_000, 2)}
BACKENDS = [name for name in available_backends("segmented_scan") if name != "reference"]
F32 = TOLERANCES[torch.float32]


def _inputs(dim: int, seqlen: int, d_state: int) -> dict[str, Tensor]:
    inputs = make_scan_inputs(1, dim, seqlen, d_state)
    inputs["delta"] = inputs["delta"].detach() - 2  # small steps, so that states remember
    return {**inputs, "initial_state": noise(1, dim, d_state, seed=3).requires_grad_()}


def _compare(what: str, backend: str) -> None:
    """Compare the scan and the convolution with the reference, with sequences in a row and without."""
    inputs = _inputs(*SIZES[what])
    u, leaves = inputs["u"], [t for t in inputs.values() if t.requires_grad]
    weight = noise(u.shape[1], 4, seed=5).requires_grad_()
    for seq_idx in (None, (torch.arange(u.shape[2]) // (u.shape[2] // 3)).int()[None]):
        settings = {"delta_softplus": True, "return_last_state": True, "seq_idx": seq_idx}
        (out, state), (expected, last) = (
            selective_scan(**inputs, **settings, backend=b) for b in (backend, "reference")
        )
        assert_close(out, expected, F32.value)
        assert_close(state, last, F32.value)
        assert_same_gradients(out, expected, leaves, F32.gradient)
        ours, theirs = (
            causal_conv1d(u, weight, None, "silu", seq_idx=seq_idx, backend=b) for b in (backend, "reference")
        )
        assert_close(ours, theirs, F32.value)
        assert_same_gradients(ours, theirs, [u, weight], F32.gradient)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_states(backend):
    _compare("300 states", backend)


@needs_native
def test_many_channels():
    _compare("80,000 channels", "native")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["80,000 channels", "70,000 tokens"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend(backend, what):
    _compare(what, backend)


@needs_native
def test_a_long_sequence_equals_its_parts():
    """The quick test of its kind: the whole against pieces that begin with the state of the piece before."""
    inputs = {name: t.detach() for name, t in _inputs(*SIZES["70,000 tokens"]).items()}
    whole, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    state, outputs = inputs["initial_state"], []
    for tokens in torch.arange(70_000).split(9_999):
        part = {n: t[..., tokens] if n in ("u", "delta", "z", "B", "C") else t for n, t in inputs.items()}
        part["initial_state"] = state
        out, state = selective_scan(**part, delta_softplus=True, return_last_state=True)
        outputs.append(out)
    assert_close(torch.cat(outputs, -1), whole, F32.value)
    assert_close(state, last, F32.value)


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="reads peaks of memory from /proc")
@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=() if what == "300 states" else pytest.mark.slow) for what in SIZES]
)
def test_memory_is_of_the_size_of_the_inputs(what):
    """The states of all tokens would be d_state times u: each token's is kept for one chunk only."""
    dim, seqlen, d_state = SIZES[what] if "tokens" not in what else (32, 70_000, 16)
    grown, of_inputs = measure(f"""
from vim.ops import selective_scan

def train(dim, seqlen, d_state):
    u, B, A = torch.randn(1, dim, seqlen), torch.randn(1, d_state, seqlen), torch.randn(dim, d_state)
    inputs = [t.requires_grad_() for t in (u, u.abs(), -A.abs(), B, B.clone(), A[:, 0].clone(), u.clone())]
    seq_idx = torch.zeros(1, seqlen, dtype=torch.int32)
    def run():
        selective_scan(*inputs, initial_state=A[None].clone(), seq_idx=seq_idx).sum().backward()
    return growth(run), sum(t.nbytes for t in inputs) / 2**20

train(8, 8, 8)  # what a first call loads
print(*train({dim}, {seqlen}, {d_state}))
""")
    assert grown < 4 * of_inputs + 8, "MiB"
