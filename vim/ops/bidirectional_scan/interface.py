"""`bidirectional_scan`: what the mixer calls between x_proj and out_proj."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vim.ops.backends.registry import resolve_backend
from vim.ops.bidirectional_scan import register as register
from vim.ops.common.checks import check_activation, check_choice, check_length, check_like, check_operand
from vim.ops.common.layout import accumulate_dtype, as_dtype, checkpoint_interval

MERGES = {"mean": 0.5, "sum": 1.0}


class ScanOperands(NamedTuple):
    """What one direction of a bidirectional scan reads.

    Attributes:
        u: Input (the convolution's output), (batch, len, dim).
        x_dbl: Output of x_proj, (batch, len, dt_rank + 2 d_state): dt, B and C side by side. Rows may be padded.
        dt_weight: Weight of dt_proj, (dim, dt_rank).
        dt_bias: Bias of dt_proj, added before softplus, (dim,).
        A_log: The decay is A = -exp(A_log), (dim, d_state).
        D: Skip connection per channel, (dim,).
    """

    u: Tensor
    x_dbl: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor


_FORWARD_WEIGHTS = tuple(f"forward.{name}" for name in ScanOperands._fields[2:])
_BACKWARD_WEIGHTS = tuple(f"backward.{name}" for name in ScanOperands._fields[2:])


def bidirectional_scan(
    forward: ScanOperands, backward: ScanOperands, z: Tensor, merge: str = "mean", *, backend: str | None = None
) -> Tensor:
    """Scan both directions, gate them and merge them, in one op.

        delta = softplus(dt dt_weight^T + dt_bias)
        y     = merge(scan(u, delta, A, B, C, D), reversed scan of the `backward` operands) silu(z)

    No input is flipped or transposed, and delta is never stored. The two directions may share tensors.

    Args:
        forward: Operands of the scan from the first token on. Activations (u, x_dbl) are float32, bfloat16, float16 or
            float64 with any strides; weights may be of any floating dtype and take part in float32 (float64 for
            float64 activations).
        backward: Operands of the scan from the last token on, of the same sizes.
        z: Gate, like `u`.
        merge: "mean" or "sum" of the directions.
        backend: Name of a backend (see `available_backends`), or `None` for the fastest that applies.

    Returns:
        y, (batch, len, dim), contiguous, in the dtype of `u`.

    Raises:
        ValueError: A shape, dtype or device disagrees with `forward.u`, `len` is 0, or `merge` is unknown.
        TypeError: An argument is no floating tensor.
        RuntimeError: The named backend cannot run here, or the memory of an argument was freed; the message says why.

    Source: Zhu et al. 2024, arXiv:2401.09417, Algorithm 1, lines 8 to 20.
    """
    u = check_activation("forward.u", forward.u, "(batch, len, dim)")
    check_length("forward.u", u.shape[1])
    _check_operands("forward", forward, forward)
    _check_operands("backward", backward, forward)
    check_like("z", z, u.shape, "(batch, len, dim)", u, "forward.u")
    check_choice("merge", merge, tuple(MERGES))
    return run_bidirectional_scan(forward, backward, z, merge, backend)


def run_bidirectional_scan(
    forward: ScanOperands, backward: ScanOperands, z: Tensor, merge: str, backend: str | None
) -> Tensor:
    """`bidirectional_scan` for operands that are known to fit."""
    acc = accumulate_dtype(z.dtype)
    u, x_dbl, *weights = forward
    u_b, x_dbl_b, *weights_b = backward
    converted, converted_b = as_dtype(acc, _FORWARD_WEIGHTS, weights), as_dtype(acc, _BACKWARD_WEIGHTS, weights_b)
    operands = (u, x_dbl, *converted, u_b, x_dbl_b, *converted_b, z)
    every = checkpoint_interval(*operands)
    return resolve_backend("bidirectional_scan", backend, z)(*operands, MERGES[merge], every)[0]


def _check_operands(side: str, operands: ScanOperands, first: ScanOperands) -> None:
    """The operands of one direction must fit `first`, those of the forward direction."""
    u, x_dbl, dt_weight, dt_bias, A_log, D = operands
    reference, batch_len = first.u, first.u.shape[:2]
    dim = reference.shape[2]
    check_like(f"{side}.u", u, reference.shape, "(batch, len, dim)", reference, "forward.u")
    for name, weight in (("dt_weight", first.dt_weight), ("A_log", first.A_log)):
        if not isinstance(weight, Tensor) or weight.dim() != 2 or 0 in weight.shape:
            got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise ValueError(f"forward.{name} must be a tensor with two axes, neither of them empty, got {got}")
    dt_rank, d_state = first.dt_weight.shape[1], first.A_log.shape[1]
    check_operand(f"{side}.dt_weight", dt_weight, (dim, dt_rank), "(dim, dt_rank)", reference, "forward.u")
    check_operand(f"{side}.A_log", A_log, (dim, d_state), "(dim, d_state)", reference, "forward.u")
    check_operand(f"{side}.dt_bias", dt_bias, (dim,), "(dim,)", reference, "forward.u")
    check_operand(f"{side}.D", D, (dim,), "(dim,)", reference, "forward.u")
    axes = "(batch, len, dt_rank + 2 d_state)"
    check_like(f"{side}.x_dbl", x_dbl, (*batch_len, dt_rank + 2 * d_state), axes, reference, "forward.u")
