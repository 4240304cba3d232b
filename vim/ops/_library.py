"""Registration of an op with torch: schema, reference, fake, autograd and FLOP formula, from one description."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from vim.ops._backends import register_reference

# The portable family and the one that is pinned to the reference (see `_backends`).
_FAMILIES = ("", "_reference")


def define_op(
    name: str,
    *,
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int],
) -> None:
    """Define `vim::name` and `vim::name_reference`.

    Args:
        name: Name of the op without its namespace.
        schema: Arguments and results in torch.library's notation; fixed arity, results are tensors.
        reference: The implementation that runs wherever no kernel is attached.
        fake: Same signature; returns empty tensors of the right shapes, dtypes and strides.
        flops: Takes the arguments with shapes in place of tensors; returns floating point operations.
    """
    for family in _FAMILIES:
        qualified = f"vim::{name}{family}"
        torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(qualified, "CompositeExplicitAutograd", reference)
        torch.library.register_fake(qualified, fake)
        register_flop_formula(getattr(torch.ops.vim, name + family))(_without_output_shape(flops))


def define_autograd(
    name: str, *, reference: Callable[..., Any], save: Callable[..., None], backward: Callable[..., Any]
) -> None:
    """Connect `vim::name` with `vim::name_backward`, each family with its own.

    Args:
        name: Name of the forward op; the backward op is `name_backward`.
        reference: The forward op's reference.
        save: `setup_context` of torch.library.register_autograd.
        backward: Takes (backward op, forward op, ctx, *grads); returns a gradient or `None` for each input.
    """
    register_reference(name, reference)
    for family in _FAMILIES:
        forward_op = getattr(torch.ops.vim, name + family).default
        backward_op = getattr(torch.ops.vim, f"{name}_backward{family}").default
        torch.library.register_autograd(
            f"vim::{name}{family}", partial(backward, backward_op, forward_op), setup_context=save
        )


def _without_output_shape(flops: Callable[..., int]) -> Callable[..., int]:
    def formula(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return flops(*args, **kwargs)

    return formula
