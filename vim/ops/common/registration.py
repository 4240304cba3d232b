"""Registration of an op with torch: schema, reference, fake, autograd and FLOP formula, from one description."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vim.ops.backends.registry import register_reference
from vim.ops.common.checks import check_memory

Implement = Callable[[str, Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class _Op:
    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    flops: Callable[..., int]

    def define(self, family: str, implement: Implement) -> None:
        qualified = f"vim::{self.name}{family}"
        torch.library.define(qualified, self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(qualified, "CompositeExplicitAutograd", implement(self.name, self.reference))
        torch.library.register_fake(qualified, _without_missing(self.name, self.fake))
        register_flop_formula(getattr(torch.ops.vim, self.name + family))(_without_output_shape(self.flops))


@dataclass(frozen=True)
class _Autograd:
    name: str
    save: Callable[..., None]
    backward: Callable[..., Any]
    cotangents: int
    again: Callable[..., Any]

    def connect(self, family: str) -> None:
        forward_op = getattr(torch.ops.vim, self.name + family).default
        backward_op = getattr(torch.ops.vim, f"{self.name}_backward{family}").default
        differentiable = _differentiable(self.again, self.cotangents, len(backward_op._schema.returns))

        def backward(ctx: Any, *grads: Any) -> Any:
            # Gradients are enabled here with create_graph=True only.
            return self.backward(differentiable if torch.is_grad_enabled() else backward_op, forward_op, ctx, *grads)

        torch.library.register_autograd(f"vim::{self.name}{family}", backward, setup_context=self.save)


def _differentiable(again: Callable[..., Any], cotangents: int, results: int) -> Callable[..., tuple[Any, ...]]:
    """Return a differentiable function in place of a backward op: PyTorch differentiates the forward op again."""

    def backward(*arguments: Any) -> tuple[Any, ...]:
        # Views: an input that another input was computed from must not get the other's gradient as well.
        grads = arguments[:cotangents]
        inputs = [t.view_as(t) if isinstance(t, Tensor) else t for t in arguments[cotangents:]]
        outputs = again(*inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        given = {i: g.to(outputs[i].dtype) for i, g in enumerate(grads) if g is not None}
        wanted = [t for t in inputs[:results] if t is not None and t.requires_grad]
        found = torch.autograd.grad(
            [outputs[i] for i in given],
            wanted,
            [*given.values()],
            create_graph=True,
            materialize_grads=True,
        )
        by_input = dict(zip(map(id, wanted), found, strict=True))
        # Zeros where no gradient is wanted, and `None` for an absent input.
        return tuple(
            by_input[id(t)] if id(t) in by_input else None if t is None else torch.zeros_like(t)
            for t in inputs[:results]
        )

    return backward


_ops: list[_Op] = []
_autograds: list[_Autograd] = []


def by_reference(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """Return an op's reference, preceded by `check_memory` on every argument."""
    names = [argument.name for argument in getattr(torch.ops.vim, name).default._schema.arguments]

    @functools.wraps(reference)
    def checked(*args: Any) -> Any:
        for argument, value in zip(names, args, strict=True):
            check_memory(argument, value)
        return reference(*args)

    return checked


def _without_missing(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Return an op's fake, which refuses tensors on the device "meta" beside tensors with memory.

    One such tensor, a weight that was never loaded, makes torch run the fake, whose results are not initialised.
    """
    names = [argument.name for argument in getattr(torch.ops.vim, name).default._schema.arguments]

    @functools.wraps(fake)
    def checked(*args: Any) -> Any:
        tensors = [(argument, value) for argument, value in zip(names, args, strict=True) if isinstance(value, Tensor)]
        missing = [argument for argument, value in tensors if value.is_meta]
        if missing and len(missing) < len(tensors):
            place = next(value.device for _, value in tensors if not value.is_meta)
            raise ValueError(f"{missing[0]} must be on the device of the other arguments, {place}, got meta")
        return fake(*args)

    return checked


# Suffixes of the families (see `backends/registry.py`): the portable one, the reference's, and added ones.
_families: dict[str, Implement] = {"": by_reference, "_reference": by_reference}


def define_family(suffix: str, implement: Implement = by_reference) -> None:
    """Define every op again, under names that end in `suffix`.

    Args:
        suffix: End of the names.
        implement: Takes (name of an op, its reference) and returns the implementation for devices without a kernel.
    """
    _families[suffix] = implement
    for op in _ops:
        op.define(suffix, implement)
    for autograd in _autograds:
        autograd.connect(suffix)


def define_op(
    name: str,
    *,
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int],
) -> None:
    """Define `vim::name` in every family.

    Args:
        name: Name of the op without its namespace.
        schema: Arguments and results in torch.library's notation; fixed arity, results are tensors.
        reference: The implementation for devices without a kernel.
        fake: Takes the same arguments; returns empty tensors of the right shapes, dtypes and strides.
        flops: Takes the arguments with shapes in place of tensors; returns floating point operations.
    """
    op = _Op(name, schema, reference, fake, flops)
    _ops.append(op)
    for family, implement in _families.items():
        op.define(family, implement)


def define_autograd(
    name: str,
    *,
    reference: Callable[..., Any],
    save: Callable[..., None],
    backward: Callable[..., Any],
    cotangents: int = 1,
    again: Callable[..., Any] | None = None,
) -> None:
    """Register `vim::name_backward` as the backward pass of `vim::name`, in each family.

    Args:
        name: Name of the forward op; the backward op is `name_backward`.
        reference: The forward op's reference.
        save: `setup_context` of torch.library.register_autograd.
        backward: Takes (backward op, forward op, ctx, *grads); returns a gradient or `None` for each input.
        cotangents: Number of gradients at the start of the backward op's arguments.
        again: Computes the outputs again from the backward op's other arguments, in plain PyTorch, for second
            derivatives. `None` is the reference: for ops whose other arguments are the forward op's.
    """
    register_reference(name, reference)
    autograd = _Autograd(name, save, backward, cotangents, again or reference)
    _autograds.append(autograd)
    for family in _families:
        autograd.connect(family)


def _without_output_shape(flops: Callable[..., int]) -> Callable[..., int]:
    def formula(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return flops(*args, **kwargs)

    return formula
