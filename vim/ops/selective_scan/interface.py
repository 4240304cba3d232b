"""`selective_scan`, the function for users."""

from __future__ import annotations

from torch import Tensor

from vim.ops.backends.registry import resolve_backend
from vim.ops.common.layout import accumulate_dtype, checkpoint_interval, to_dtype
from vim.ops.selective_scan import register as register
from vim.ops.selective_scan.checks import check_scan_inputs, check_segments, decay_dtype


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    reverse: bool = False,
    backend: str | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run Mamba's selective recurrence along the last axis.

        h[l] = exp(delta[l] A) h[l-1] + delta[l] B[l] u[l];    y[l] = (<C[l], h[l]> + D u[l]) silu(z[l])

    Every input but `seq_idx` gets a gradient. States, A, softplus and sums are float32 (float64 for float64 input),
    under autocast and for half inputs too.

    Args:
        u: Input, (batch, dim, len); float32, bfloat16, float16 or float64. Any strides.
        delta: Step size, like `u`.
        A: Decay, negative in a stable model, (dim, d_state); real or complex. With a complex A, y is 2 Re<C, h>.
        B: Input map, in the dtype of `u`: (batch, d_state, len), or (batch, groups, d_state, len) where consecutive
            dim / groups channels share a group, or constant, (dim, d_state). With a complex A the last axis of the
            first two kinds holds (re, im) pairs, 2 len numbers, and the constant kind is complex.
        C: Output map, like `B` (the two may be of different kinds).
        D: Skip connection per channel, (dim,); `None` leaves the term out.
        z: Gate, like `u`; `None` leaves the gate out.
        delta_bias: Added to `delta` before softplus, (dim,).
        delta_softplus: Apply softplus to `delta`.
        return_last_state: Also return the state after the last step of the scan.
        reverse: Scan from the last token to the first, without a flipped copy.
        backend: Name of a backend (see `available_backends`), or `None` for the fastest that applies.
        initial_state: The state before the first step of the scan, (batch, dim, d_state), such as the last state of
            an earlier part of the sequence; `None` is 0. With a complex A it is complex.
        seq_idx: Index of the sequence of each token, (batch, len), int32, for several sequences in one row.
            The state restarts from 0 where the index changes: each sequence gets the result that it has alone.
            `initial_state` belongs to the first sequence of a scan, and the last state to the last one.

    Returns:
        Same shape and dtype as `u`; with `return_last_state` also the last state, (batch, dim, d_state), in the
        dtype of the recurrence.

    Raises:
        ValueError: A shape, dtype or device disagrees with `u`, or `len` is 0; the message names both values.
        TypeError: An argument is not a tensor, or has a dtype that the scan does not take.
        RuntimeError: The named backend cannot run here, or the memory of an argument was freed; the message says why.

    Source: Gu and Dao 2023, arXiv:2312.00752, Algorithm 2; argument order of mamba-ssm's `selective_scan_fn`.
    """
    check_scan_inputs(u, delta, A, B, C, D, z, delta_bias)
    check_segments(A, u, initial_state, seq_idx)
    acc, decay = accumulate_dtype(u.dtype), decay_dtype(A, u)
    A = to_dtype("A", A, decay)
    B = to_dtype("B", B, decay) if B.dim() == 2 else B
    C = to_dtype("C", C, decay) if C.dim() == 2 else C
    D = None if D is None else to_dtype("D", D, acc)
    delta_bias = None if delta_bias is None else to_dtype("delta_bias", delta_bias, acc)
    initial_state = None if initial_state is None else to_dtype("initial_state", initial_state, decay)
    tensors: tuple[Tensor | None, ...] = (u, delta, A, B, C, D, z, delta_bias)
    every = checkpoint_interval(*tensors, initial_state)
    if initial_state is None and seq_idx is None:
        op = resolve_backend("selective_scan", backend, u)
    else:
        op = resolve_backend("segmented_scan", backend, u)
        tensors = (*tensors, initial_state, seq_idx)
    out, last_state, _ = op(*tensors, delta_softplus, reverse, every)
    return (out, last_state) if return_last_state else out
