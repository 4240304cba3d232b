"""`bidirectional_scan`, the function for users; the mixer runs it between x_proj and out_proj."""

from __future__ import annotations

from torch import Tensor

from vim.ops.backends.registry import resolve_backend
from vim.ops.bidirectional_scan import register as register
from vim.ops.bidirectional_scan.operands import ScanOperands
from vim.ops.common.checks import check_activation, check_axes, check_choice, check_length, check_like, check_operand
from vim.ops.common.layout import accumulate_dtype, as_dtype, checkpoint_interval

MERGES = {"mean": 0.5, "sum": 1.0}


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
        TypeError: An argument is not a floating tensor.
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
    """Run `bidirectional_scan` on operands that are known to fit."""
    acc = accumulate_dtype(z.dtype)
    u, x_dbl, *weights = forward
    u_b, x_dbl_b, *weights_b = backward
    converted, converted_b = as_dtype(acc, _FORWARD_WEIGHTS, weights), as_dtype(acc, _BACKWARD_WEIGHTS, weights_b)
    operands = (u, x_dbl, *converted, u_b, x_dbl_b, *converted_b, z)
    every = checkpoint_interval(*operands)
    return resolve_backend("bidirectional_scan", backend, z)(*operands, MERGES[merge], every)[0]


def _check_operands(side: str, operands: ScanOperands, forward: ScanOperands) -> None:
    """Raise unless the operands of one direction fit the input and the weights of the forward direction."""
    u = forward.u
    batch, seqlen, dim = u.shape
    dt_rank = check_axes("forward.dt_weight", forward.dt_weight, "(dim, dt_rank)")[1]
    d_state = check_axes("forward.A_log", forward.A_log, "(dim, d_state)")[1]
    check_like(f"{side}.u", operands.u, u.shape, "(batch, len, dim)", u, "forward.u")
    for name, shape, axes in (
        ("dt_weight", (dim, dt_rank), "(dim, dt_rank)"),
        ("A_log", (dim, d_state), "(dim, d_state)"),
        ("dt_bias", (dim,), "(dim,)"),
        ("D", (dim,), "(dim,)"),
    ):
        check_operand(f"{side}.{name}", getattr(operands, name), shape, axes, u, "forward.u")
    projected = (batch, seqlen, dt_rank + 2 * d_state)
    check_like(f"{side}.x_dbl", operands.x_dbl, projected, "(batch, len, dt_rank + 2 d_state)", u, "forward.u")
