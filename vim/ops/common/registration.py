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
        torch.library.register_fake(qualified, self.fake)
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
            # Operations are recorded here with create_graph=True alone.
            return self.backward(differentiable if torch.is_grad_enabled() else backward_op, forward_op, ctx, *grads)

        torch.library.register_autograd(f"vim::{self.name}{family}", backward, setup_context=self.save)


def _differentiable(again: Callable[..., Any], cotangents: int, results: int) -> Callable[..., tuple[Any, ...]]:
    """A backward op as a function that has derivatives itself, because PyTorch differentiates the forward op again."""

    def backward(*arguments: Any) -> tuple[Any, ...]:
        # Views, so that an input which another one was made from counts for itself alone.
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
        # Zeros where nobody wants a gradient; `None` stands for an absent input's.
        return tuple(
            by_input[id(t)] if id(t) in by_input else None if t is None else torch.zeros_like(t)
            for t in inputs[:results]
        )

    return backward


_ops: list[_Op] = []
_autograds: list[_Autograd] = []


def by_reference(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """Return an op's reference with a check that the memory of every argument is there."""
    names = [argument.name for argument in getattr(torch.ops.vim, name).default._schema.arguments]

    @functools.wraps(reference)
    def checked(*args: Any) -> Any:
        for argument, value in zip(names, args, strict=True):
            check_memory(argument, value)
        return reference(*args)

    return checked


# Endings of the families' names: the portable one, the one pinned to the reference (see `_backends`), and those added.
_families: dict[str, Implement] = {"": by_reference, "_reference": by_reference}


def define_family(suffix: str, implement: Implement = by_reference) -> None:
    """Define every op once more, under names that end in `suffix`.

    Args:
        suffix: Ending of the names.
        implement: Takes (name of an op, its reference) and returns what runs wherever no kernel is attached.
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
        reference: The implementation that runs wherever no kernel is attached.
        fake: Same signature; returns empty tensors of the right shapes, dtypes and strides.
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
    """Connect `vim::name` with `vim::name_backward`, each family with its own.

    Args:
        name: Name of the forward op; the backward op is `name_backward`.
        reference: The forward op's reference.
        save: `setup_context` of torch.library.register_autograd.
        backward: Takes (backward op, forward op, ctx, *grads); returns a gradient or `None` for each input.
        cotangents: How many of the backward op's arguments, the first ones, are gradients.
        again: Takes the others, returns the outputs they belong to, in plain PyTorch; the reference where those are the
            forward op's arguments.
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
