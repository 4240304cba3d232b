"""The calls on which every backend must agree with the reference, and how their results are compared.

A case is a choice along each axis of an op (sizes, dtypes, layouts, ...). `pairwise` picks the cases: every two choices
of different axes occur together in at least one of them. `test_conformance.py` runs them on the backends that need no
GPU, `tests/gpu` on those that do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import vim
from tests.helpers import (
    TOLERANCES,
    assert_golden,
    golden_mixer,
    golden_tolerances,
    load_golden,
    make_bidirectional_inputs,
    make_scan_inputs,
)
from vim.ops import default_backend, selective_scan
from vim.ops.backends.registry import resolve_backend

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Axes = Mapping[str, Sequence[Any]]


def pairwise(axes: Axes) -> list[dict[str, Any]]:
    """Choose along every axis until each two choices of different axes have occurred together."""
    names = sorted(axes)

    def pairs(row: Mapping[str, int]) -> set[tuple[tuple[str, int], ...]]:
        return set(itertools.combinations(((n, row[n]) for n in names if n in row), 2))

    missing = set().union(
        *(
            pairs({a: i, b: j})
            for a, b in itertools.combinations(names, 2)
            for i in range(len(axes[a]))
            for j in range(len(axes[b]))
        )
    )
    rows = []
    while missing:
        row = dict(min(missing))
        for name in names:
            if name not in row:
                row[name] = max(range(len(axes[name])), key=lambda i, n=name: len(pairs({**row, n: i}) & missing))
        missing -= pairs(row)
        rows.append({name: axes[name][i] for name, i in row.items()})
    return rows


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 9) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run_op(name: str, *args: object) -> tuple[Tensor, ...]:
    """Return what `vim::name` returns, as a tuple."""
    with torch.no_grad():
        result = getattr(torch.ops.vim, name)(*args)
    return result if isinstance(result, tuple) else (result,)


def detached(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.detach() for t in tensors]


@dataclass(frozen=True)
class Target:
    """A backend whose kernels are a family of registered ops.

    Attributes:
        name: Name of the backend.
        suffix: Ending of its ops' names.
        axes: By op, choices that replace those of `AXES`.
        device: Where it runs.
        on_gpu: Compare with the tolerances of a GPU.
        missing: Ops that the backend does not have.
    """

    name: str
    suffix: str
    axes: Mapping[str, Axes]
    device: str = "cpu"
    on_gpu: bool = False
    missing: Sequence[str] = ()

    def cases(self, op: str) -> list[dict[str, Any]]:
        """Return the cases of an op; none where the backend has no such op."""
        return pairwise({**AXES[op], **self.axes.get(op, {})}) if op not in self.missing else []

    def check(self, op: str, *args: object) -> tuple[Tensor, ...]:
        """Compare an op's results with the reference's, and return the latter, on the CPU."""
        moved = [a.to(self.device) if isinstance(a, Tensor) else a for a in args]
        actual, expected = run_op(op + self.suffix, *moved), run_op(f"{op}_reference", *moved)
        self.compare(op, actual, expected)
        if "backward" not in op:  # strides are part of what the fakes promise
            strides = [[t.stride() for t in results] for results in (actual, expected)]
            assert [t.is_contiguous() for t in actual] == [t.is_contiguous() for t in expected], (op, strides)
        return tuple(t.cpu() for t in expected)

    def compare(self, op: str, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        for i, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
            what = f"{op} of {self.name}, output {i}"
            assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), what
            if wanted.numel():
                error = (got.double() - wanted.double()).abs().max().item()
                allowed = TOLERANCES[wanted.dtype]
                rtol = allowed.gpu if self.on_gpu else allowed.backward if "backward" in op else allowed.value
                bound = rtol * wanted.abs().max().item() + 1e-7
                assert error <= bound, f"{what}: error {error:.3g} > {bound:.3g}"


class PlainTarget(Target):
    """A backend of plain functions: its gradients are autograd's, and it keeps no entry states."""

    def check(self, op: str, *args: object) -> tuple[Tensor, ...]:
        """Compare values and gradients; return the reference's values. A call of a backward op is passed over."""
        if op.endswith("_backward"):
            return ()
        leaves = [a.detach().to(self.device).requires_grad_() if isinstance(a, Tensor) else a for a in args]
        tensors = [a for a in leaves if isinstance(a, Tensor)]
        results = []
        for name in (self.name, "reference"):
            outputs = resolve_backend(op, name, tensors[0])(*leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            seen = outputs[:1] if "scan" in op else outputs
            grads = torch.autograd.grad(seen, tensors, [noise(*y.shape, dtype=y.dtype).to(y.device) for y in seen])
            results.append((detached(outputs[: -1 if "scan" in op else None]), list(grads)))
        (actual, grads), (expected, wanted) = results
        self.compare(op, actual, expected)
        self.compare(f"{op} backward", grads, wanted)
        entry = outputs[-1:] if "scan" in op else ()
        return tuple(t.cpu() for t in (*expected, *detached(entry)))


Check = Callable[..., tuple[Tensor, ...]]


def bidirectional_scan(
    check: Check, length: int, widths: tuple[int, int, int], dtype: torch.dtype, every: int, layout: str, scale: float
) -> None:
    """Compare both scans; `widths` are (dim, d_state, dt_rank)."""
    tensors = detached(make_bidirectional_inputs(2, length, *widths, dtype))
    dim, columns = widths[0], widths[2] + 2 * widths[1]
    if layout != "contiguous":
        start = int(layout == "unaligned")
        xz = noise(2, length, 2 * dim + 2, dtype=dtype)
        padded = torch.cat([tensors[1], tensors[1][..., :5] * float("nan")], -1)[..., :columns]
        tensors = [t.mT.contiguous().mT if t.dim() == 2 else t for t in tensors]
        tensors[0], tensors[1], tensors[12] = (
            xz[..., start : dim + start],
            padded,
            xz[..., dim + start : 2 * dim + start],
        )
        if layout == "channels first":
            every_other = torch.stack([tensors[7]] * 2, -1)[..., 0]
            expanded = noise(1, 1, dim, dtype=dtype).expand(2, length, dim)
            tensors[0], tensors[6], tensors[7], tensors[12] = (
                tensors[0].mT.contiguous().mT,
                expanded,
                every_other,
                expanded,
            )
        else:
            tensors[6], tensors[7] = xz[..., 2 * start : dim + 2 * start], tensors[7].mT.contiguous().mT
    y, entry, *_ = check("bidirectional_scan", *tensors, scale, every)
    if every > 0:
        check("bidirectional_scan_backward", noise(*y.shape, dtype=dtype), *tensors, entry, scale, every)


def selective_scan_inputs(kind: str, length: int, widths: tuple[int, int], dtype: torch.dtype) -> list[Tensor | None]:
    """Return operands of one scan; `widths` are (dim, d_state), the former with a divisor for each kind of groups."""
    dim, d_state = widths
    inputs = {name: t.detach() for name, t in make_scan_inputs(2, dim, length, d_state, dtype).items()}
    if kind == "bare":
        inputs.update(D=None, z=None, delta_bias=None)
    if kind == "no softplus":  # steps must be positive, or states grow without bound
        inputs.update({name: inputs[name].abs() / 8 for name in ("delta", "delta_bias")})
    if kind == "grouped":
        inputs.update({name: noise(2, 2, d_state, length, dtype=dtype) for name in "BC"})
    if kind == "mixed groups":
        inputs["B"] = noise(2, 3, d_state, length, dtype=dtype)
        inputs["C"] = noise(2, 6, length, d_state, dtype=dtype).mT
    if kind in ("constant", "constant B"):
        inputs["B"] = noise(dim, d_state)
    if kind == "constant":
        inputs["C"] = noise(d_state, dim).mT
    return list(inputs.values())


def one_scan(
    check: Check,
    length: int,
    widths: tuple[int, int],
    dtype: torch.dtype,
    every: int,
    kind: str,
    channel_last: bool,
    reverse: bool,
    op: str = "selective_scan",
    segments: Sequence[Tensor | None] = (),
) -> None:
    """Compare one scan, with and without a gradient of its last state; `segments` follow the other tensors."""
    tensors = selective_scan_inputs(kind, length, widths, dtype)
    if channel_last:
        for i in (0, 1, 6):  # u, delta, z
            tensors[i] = None if tensors[i] is None else tensors[i].mT.contiguous().mT
    tensors += segments
    settings = (kind != "no softplus", reverse, every)
    out, state, entry = check(op, *tensors, *settings)
    if every > 0:
        for dlast in (None, noise(*state.shape)):
            check(f"{op}_backward", noise(*out.shape, dtype=dtype), dlast, *tensors, entry, *settings)


def sequence_indices(length: int, mean: int) -> Tensor:
    """Return indices (2, length) of sequences whose lengths are random, `mean` tokens on average."""
    starts = torch.rand(2, length, generator=torch.Generator().manual_seed(length)) < 1 / mean
    return (starts.cumsum(1) % 3 - 1).int()


def segmented_scan(
    check: Check, length: int, widths: tuple[int, int], mean: int | None, initial: bool, **more: Any
) -> None:
    """Compare one scan that begins from a state, over sequences of `mean` tokens; `None` is one sequence."""
    segments = [noise(2, *widths[::-1], seed=4).mT if initial else None]
    segments += [None if mean is None else sequence_indices(length, mean)]
    one_scan(check, length, widths, channel_last=False, op="segmented_scan", segments=segments, **more)


def convolution_inputs(length: int, dim: int, start: int | None, dtype: torch.dtype) -> Tensor:
    """Return (2, length, dim) numbers: contiguous, or channels of a wider tensor from `start` on."""
    wide = noise(2, length, 2 * dim + 8, dtype=dtype)
    return wide[..., :dim].contiguous() if start is None else wide[..., start : start + dim]


def both_convolutions(
    check: Check,
    length: int,
    dim: int,
    widths: tuple[int, int],
    biases: tuple[bool, bool],
    dtype: torch.dtype,
    start: int | None,
    expanded: bool,
) -> None:
    """Compare the convolutions of both directions; `expanded` gradients have no memory of their own."""
    x = convolution_inputs(length, dim, start, dtype)
    weights = [noise(dim, widths[0]), noise(dim) if biases[0] else None]
    weights += [noise(widths[1], dim, seed=3).mT, noise(dim, seed=3) if biases[1] else None]
    check("bidirectional_conv1d", x, *weights)
    douts = [noise(2, length, dim, dtype=dtype, seed=1), noise(2, length, dim, dtype=dtype, seed=2)]
    if expanded:
        douts = [noise(2, dim, length, dtype=dtype).mT, noise(2, 1, dim, dtype=dtype).expand(2, length, dim)]
    check("bidirectional_conv1d_backward", *douts, x, *weights)


def one_convolution(
    check: Check,
    length: int,
    dim: int,
    width: int,
    bias: bool,
    dtype: torch.dtype,
    start: int | None,
    channel_last: bool,
    silu: bool,
    reverse: bool,
    op: str = "causal_conv1d",
    segments: Sequence[Tensor] = (),
) -> None:
    """Compare one convolution, over channels or tokens that lie side by side."""
    x = convolution_inputs(length, dim, start, dtype).mT
    x = x if channel_last else x.contiguous()
    arguments = (noise(dim, width), noise(dim) if bias else None, *segments, silu, reverse)
    out = check(op, x, *arguments)[0]
    dout = torch.empty_like(out).copy_(noise(*out.shape, dtype=dtype, seed=1))
    check(f"{op}_backward", dout, x, *arguments)


def segmented_convolution(check: Check, length: int, mean: int, **more: Any) -> None:
    """Compare one convolution over sequences of `mean` tokens."""
    one_convolution(check, length, op="segmented_conv1d", segments=[sequence_indices(length, mean)], **more)


def norm(
    check: Check,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    half_weight: bool,
    residual: str,
    layout: str,
    grads: tuple[bool, bool],
) -> None:
    """Compare the norm of a sum; `grads` tells which of its two outputs have a gradient."""
    wide = noise(*shape[:-1], 2 * shape[-1] + 1, dtype=dtype)
    x = {
        "contiguous": wide[..., : shape[-1]].contiguous(),
        "part": wide[..., : shape[-1]],
        "unaligned part": wide[..., 1 : 1 + shape[-1]],
        "transposed": wide[..., : shape[-1]].transpose(0, -1).contiguous().transpose(0, -1),
    }[layout]
    weight = noise(shape[-1], seed=2)
    added = {
        "none": None,
        "plain": noise(*shape, seed=3),
        "transposed": noise(*shape[::-1], seed=3).permute(*range(len(shape))[::-1]),
    }
    r = check("add_rms_norm", x, added[residual], weight.to(dtype) if half_weight else weight, 1e-5)[1]
    dy, dr = noise(*shape, dtype=dtype, seed=4), noise(*shape, seed=5)
    check("add_rms_norm_backward", dy if grads[0] else None, dr if grads[1] else None, r, weight, 1e-5)


OPS: dict[str, Callable[..., None]] = {
    "bidirectional_scan": bidirectional_scan,
    "selective_scan": one_scan,
    "segmented_scan": segmented_scan,
    "bidirectional_conv1d": both_convolutions,
    "causal_conv1d": one_convolution,
    "segmented_conv1d": segmented_convolution,
    "add_rms_norm": norm,
}
_BOTH = (False, True)
AXES: dict[str, Axes] = {
    "bidirectional_scan": {
        "length": (1, 2, 63, 64, 65, 150, 197),
        "widths": ((1, 16, 1), (5, 3, 12), (16, 1, 1), (24, 17, 12), (48, 16, 12)),
        "dtype": FLOATS,
        "every": (64, 1, 3, 1000, 2**62, 2**63 - 1, 0),
        "layout": ("contiguous", "halves", "channels first", "unaligned"),
        "scale": (0.5, 1.0),
    },
    "selective_scan": {
        "length": (1, 64, 67, 150),
        "widths": ((6, 5), (36, 6), (24, 16)),
        "dtype": FLOATS,
        "every": (32, 1, 3, 1000, 2**62, 2**63 - 1, 0),
        "kind": ("plain", "bare", "no softplus", "grouped", "constant", "constant B", "mixed groups"),
        "channel_last": _BOTH,
        "reverse": _BOTH,
    },
    "segmented_scan": {
        "length": (1, 64, 67, 150),
        "widths": ((6, 5), (36, 6), (24, 19)),
        "dtype": FLOATS,
        "every": (32, 1, 3, 1000, 0),
        "kind": ("plain", "bare", "no softplus", "grouped", "constant", "constant B", "mixed groups"),
        "mean": (20, 1, 3, None),
        "initial": _BOTH,
        "reverse": _BOTH,
    },
    "bidirectional_conv1d": {
        "length": (1, 2, 5, 64, 131),
        "dim": (4, 5, 33, 68),
        "widths": ((4, 4), (1, 2), (3, 7), (7, 4)),
        "biases": ((True, True), (True, False), (False, True), (False, False)),
        "dtype": FLOATS,
        "start": (None, 1, 2, 4, 5),
        "expanded": _BOTH,
    },
    "causal_conv1d": {
        "length": (1, 2, 5, 64, 131),
        "dim": (4, 5, 33, 68),
        "width": (4, 1, 2, 3, 7),
        "bias": _BOTH,
        "dtype": FLOATS,
        "start": (None, 4, 5),
        "channel_last": _BOTH,
        "silu": _BOTH,
        "reverse": _BOTH,
    },
    "segmented_conv1d": {
        "length": (1, 2, 5, 64, 131),
        "dim": (4, 5, 33),
        "width": (4, 1, 3, 7),
        "bias": _BOTH,
        "dtype": FLOATS,
        "start": (None, 4, 5),
        "channel_last": _BOTH,
        "silu": _BOTH,
        "reverse": _BOTH,
        "mean": (70, 1, 3),
    },
    "add_rms_norm": {
        "shape": ((1,), (1, 1), (3, 7), (2, 5, 48), (33, 192), (40, 33), (2, 768)),
        "dtype": FLOATS,
        "half_weight": _BOTH,
        "residual": ("plain", "none", "transposed"),
        "layout": ("contiguous", "part", "unaligned part", "transposed"),
        "grads": ((True, True), (True, False), (False, True), (False, False)),
    },
}


def run_case(target: Target, op: str, case: Mapping[str, Any]) -> None:
    """Run one case of an op on a backend."""
    OPS[op](target.check, **case)


def parameters(targets: Sequence[Target]) -> Iterator[Any]:
    """Yield (target, op, case) of all cases, as parameters of a test."""
    for target, op in itertools.product(targets, OPS):
        for case in target.cases(op):
            described = " ".join(str(v).removeprefix("torch.") for v in case.values())
            yield pytest.param(target, op, case, id=f"{target.name}-{op}-{described}")


def check_empty(target: Target, sizes: Sequence[tuple[int, int]] = ((0, 5), (2, 0), (0, 0))) -> None:
    """Compare calls without images, without tokens, and without both; `sizes` are (batch, length)."""
    for batch, length in sizes:
        tensors = detached(make_bidirectional_inputs(batch, length, 6, 4, 2))
        y, entry, *_ = target.check("bidirectional_scan", *tensors, 0.5, 64)
        target.check("bidirectional_scan_backward", y, *tensors, entry, 0.5, 64)
        tensors = detached(make_scan_inputs(batch, 6, length, 4).values())
        out, state, entry = target.check("selective_scan", *tensors, True, True, 64)
        target.check("selective_scan_backward", out, state, *tensors, entry, True, True, 64)
        tensors += [noise(batch, 6, 4), torch.zeros(batch, length, dtype=torch.int32)]
        out, state, entry = target.check("segmented_scan", *tensors, True, True, 64)
        target.check("segmented_scan_backward", out, state, *tensors, entry, True, True, 64)
        x, weight = noise(batch, length, 6), noise(6, 4)
        target.check("bidirectional_conv1d", x, weight, None, weight, None)
        target.check("bidirectional_conv1d_backward", x, x, x, weight, None, weight, None)
        target.check("segmented_conv1d", x.mT, weight, None, tensors[-1], True, False)
        target.check("segmented_conv1d_backward", x.mT, x.mT, weight, None, tensors[-1], True, False)
        target.check("add_rms_norm", x, None, noise(6), 1e-5)
        target.check("add_rms_norm_backward", x, None, x, noise(6), 1e-5)


def check_extremes(target: Target) -> None:
    """Compare steps from nothing to so large that every state is forgotten, and gates far out on both sides."""
    inputs = {name: t.detach() for name, t in make_scan_inputs(1, 24, 40, 16).items()}
    inputs["delta"] = torch.linspace(-120, 120, 40).expand(1, 24, 40)
    inputs["z"] = torch.linspace(-120, 120, 24)[None, :, None].expand(1, 24, 40)
    far = {name: t.detach() for name, t in make_scan_inputs(2, 24, 200, 16).items()}
    far["delta"][:, 5:12, 70:75] = 300.0  # in some chunks of tokens and blocks of channels, beside ordinary ones
    far["delta"][1, 20, 199] = 1e9
    for tensors, reverse in ((inputs, False), (far, False), (far, True)):
        out, state, entry = target.check("selective_scan", *tensors.values(), True, reverse, 64)
        for dlast in (None, noise(*state.shape)):
            args = (noise(*out.shape), dlast, *tensors.values(), entry, True, reverse, 64)
            target.check("selective_scan_backward", *args)


def everything(
    suffix: str, sizes: tuple[int, int, int, int, int], dtype: torch.dtype, device: str = "cpu"
) -> list[Tensor]:
    """Return all results of all ops; `sizes` are (batch, len, dim, d_state, dt_rank)."""
    batch, length, dim, d_state, _ = sizes

    def run(op: str, *args: object) -> tuple[Tensor, ...]:
        return run_op(op + suffix, *(a.to(device) if isinstance(a, Tensor) else a for a in args))

    tensors = detached(make_bidirectional_inputs(*sizes, dtype))
    x, every = tensors[0], max(length // 3, 1)
    y, entry = run("bidirectional_scan", *tensors, 0.5, every)
    results = [y, entry, *run("bidirectional_scan_backward", x, *tensors, entry, 0.5, every)]
    weights = (noise(dim, 4), noise(dim), noise(dim, 4), noise(dim))
    results += run("bidirectional_conv1d", x, *weights)
    results += run("bidirectional_conv1d_backward", x, y, x, *weights)
    normed, r = run("add_rms_norm", x, None, weights[1], 1e-5)
    results += [normed, r, *run("add_rms_norm_backward", x, r, r, weights[1], 1e-5)]
    inputs = detached(make_scan_inputs(batch, dim, length, d_state, dtype).values())
    out, state, entry = run("selective_scan", *inputs, True, True, every)
    results += [out, state, entry, *run("selective_scan_backward", out, state, *inputs, entry, True, True, every)]
    results += run("causal_conv1d", x.mT, *weights[:2], True, False)
    results += run("causal_conv1d_backward", x.mT, x.mT, *weights[:2], True, False)
    seq_idx = (torch.arange(length) // 3).int().expand(batch, -1)
    inputs += [noise(batch, dim, d_state), seq_idx]
    out, state, entry = run("segmented_scan", *inputs, True, False, every)
    results += [out, state, entry, *run("segmented_scan_backward", out, state, *inputs, entry, True, False, every)]
    results += run("segmented_conv1d", x.mT, *weights[:2], seq_idx, True, True)
    return [*results, *run("segmented_conv1d_backward", x.mT, x.mT, *weights[:2], seq_idx, True, True)]


def by_threads(run: Callable[[], Any], counts: Sequence[int] = (1, 2, 5)) -> list[Any]:
    """Return what a function returns with these numbers of threads."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    return results


def assert_same_bits(results: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(results, others, strict=True)):
        assert torch.equal(a, b), f"result {i}"


def check_every_output_is_written(run: Callable[[], list[Tensor]]) -> None:
    """Run again with fresh memory full of NaN, outputs and workspace alike: nothing may change."""
    plain, before = run(), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        filled = run()
    finally:
        torch.use_deterministic_algorithms(before)
    assert_same_bits(plain, filled)


def check_golden_scan(case: str, backend: str, device: str = "cpu", close: Callable[..., None] = assert_golden) -> None:
    """Compare one scan, and its gradients, with the original's numbers."""
    metadata, tensors = load_golden("scan", case)
    inputs = {key[3:]: t.to(device).requires_grad_() for key, t in tensors.items() if key.startswith("in.")}
    softplus = metadata["delta_softplus"] == "true"
    out, state = selective_scan(**inputs, delta_softplus=softplus, return_last_state=True, backend=backend)
    listed = golden_tolerances(f"scan/{case}")
    close(out.cpu(), tensors["out64"], listed["out"], "out")
    close(state.cpu(), tensors["last_state"], listed["last_state"], "last_state")
    grads = torch.autograd.grad(out, list(inputs.values()), tensors["cotangent"].to(device))
    for name, grad in zip(inputs, grads, strict=True):
        close(grad.cpu(), tensors[f"grad.{name}"], listed[f"grad.{name}"], f"grad.{name}")


def check_golden_mixer(
    case: str,
    backend: str | None,
    device: str = "cpu",
    close: Callable[..., None] = assert_golden,
    change: Callable[[vim.Mamba], None] = lambda mixer: None,
) -> None:
    """Compare a mixer, changed by what sees its modules, and its gradients with the original's numbers."""
    mixer, tensors = golden_mixer(case)
    parameters = dict(mixer.to(device).named_parameters())
    change(mixer)
    x = tensors["x"].to(device).requires_grad_()
    with default_backend(backend):
        out = mixer(x)
        (out * tensors["cotangent"].to(device)).sum().backward()
    listed = golden_tolerances(f"mixer/{case}")
    close(out.cpu(), tensors["out64"], listed["out"], "out")
    close(x.grad.cpu(), tensors["grad.x"], listed["grad.x"], "grad.x")
    for name, parameter in parameters.items():
        key = f"grad.param.{name}"
        close(parameter.grad.cpu(), tensors[key], listed[key], key)
