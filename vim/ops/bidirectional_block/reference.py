"""A layer in plain PyTorch, composed of the other ops' references: the specification of every other backend.

    r           = hidden_states + residual
    x, z        = rms_norm(r) in_proj^T + in_bias
    u, u_b      = silu(conv(x)) looking back, and ahead for the backward direction
    x_dbl       = u x_proj^T for each direction
    y           = scale (scan(u, x_dbl) + scan_b(u_b, x_dbl_b)) silu(z)
    out         = y out_proj^T + out_bias

Activations between these steps are rounded to `dtype`; arithmetic, weights and r are float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vim.ops.add_rms_norm import reference as add_rms_norm
from vim.ops.bidirectional_conv1d import reference as bidirectional_conv1d
from vim.ops.bidirectional_scan import reference as bidirectional_scan
from vim.ops.common.layout import accumulate_dtype

# Number of weights among the arguments; see the schema in `register.py`.
WEIGHTS = 19

_REFERENCES: dict[str, Callable[..., Any]] = {
    "add_rms_norm": add_rms_norm.add_rms_norm,
    "bidirectional_conv1d": bidirectional_conv1d.bidirectional_conv1d,
    "bidirectional_scan": bidirectional_scan.bidirectional_scan,
}


def bidirectional_block(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return out, r, and for a backward pass xz, x_dbl of both directions and the scans' entry states."""
    return compose(_REFERENCES, *arguments)


def compose(
    ops: Mapping[str, Callable[..., Any]], hidden_states: Tensor, residual: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run a layer on these implementations of the ops; the arguments are as `vim::bidirectional_block` takes them."""
    dtype, eps, scale, checkpoint_every = arguments[WEIGHTS:]
    acc = accumulate_dtype(dtype)
    weights: list[Any] = [None if w is None else w.to(acc) for w in arguments[:WEIGHTS]]
    norm_weight, in_proj, in_bias, *directions, out_proj, out_bias = weights
    forward, backward = directions[:7], directions[7:]

    def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = x.to(acc) @ weight.mT
        return (y if bias is None else y + bias).to(dtype)

    with torch.autocast(hidden_states.device.type, enabled=False):
        normed, total = ops["add_rms_norm"](hidden_states, residual, norm_weight, eps)
        xz = product(normed.to(dtype), in_proj, in_bias)
        x, z = xz.chunk(2, dim=-1)
        convolutions = [w if w is None or w.dim() == 1 else w.flatten(1) for w in (*forward[:2], *backward[:2])]
        outputs = ops["bidirectional_conv1d"](x, *convolutions)
        projected = [product(u, w[2]) for u, w in zip(outputs, (forward, backward), strict=True)]
        operands = [
            operand
            for u, x_dbl, w in zip(outputs, projected, (forward, backward), strict=True)
            for operand in (u, x_dbl, *w[3:])
        ]
        y, checkpoints = ops["bidirectional_scan"](*operands, z, scale, checkpoint_every)
        out = product(y, out_proj, out_bias)
    if checkpoint_every == 0:
        return out, total, xz.new_empty(0), xz.new_empty(0), total.new_empty(0)
    return out, total, xz, torch.stack(projected), checkpoints


def bidirectional_block_backward(
    dout: Tensor, dresidual: Tensor | None, residual: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """Return the gradients of r and of the weights, by autograd through the forward pass from r on.

    The gradient of an absent weight is empty. So are the gradients of the products' weights, unless `weight_grads`.
    """
    weights, (xz, _, _, eps, scale, _, weight_grads) = arguments[:WEIGHTS], arguments[WEIGHTS:]
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in (residual, *weights)]
        out = bidirectional_block(leaves[0], None, *leaves[1:], xz.dtype, eps, scale, 0)[0]
        wanted = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad(out, wanted, dout))
    grads: list[Any] = [None if t is None else next(found) for t in leaves]
    total = grads[0] if dresidual is None else grads[0] + dresidual
    products = {1 + i for i in PRODUCTS} if not weight_grads else set()
    empty = xz.new_empty
    return total, *(
        empty(0, dtype=accumulate_dtype(xz.dtype)) if g is None else empty(0, dtype=g.dtype) if i in products else g
        for i, g in enumerate(grads[1:], start=1)
    )


# Indices of the products' weights and biases among the weights.
PRODUCTS = (1, 2, 5, 12, 17, 18)
