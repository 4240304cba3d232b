"""Products of the CPU's kernels against float64: strides, element types, odd sizes, threads.

`test_native_kernels.py` runs these checks on every instruction set.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.ops.conformance import FLOATS
from tests.ops.natives import needs_native
from vim.ops.backends import native

pytestmark = needs_native

_generator = torch.Generator().manual_seed(9)

# What no product may read, or leave where it writes.
GUARD = float("nan")


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=_generator).to(dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers among others that are not: rows or columns side by side, at a distance, or neither."""
    rows, columns = x.shape
    if layout == "rows":
        return x.clone()
    if layout == "columns":
        return x.t().contiguous().t()
    if layout == "far rows":
        memory = torch.full((rows, columns + 5), GUARD, dtype=x.dtype)
        view = memory[:, 2 : 2 + columns]
    elif layout == "far columns":
        memory = torch.full((columns, rows + 3), GUARD, dtype=x.dtype)
        view = memory[:, 1 : 1 + rows].t()
    else:
        memory = torch.full((rows, 2 * columns), GUARD, dtype=x.dtype)
        view = memory[:, ::2]
    return view.copy_(x)


LAYOUTS = ("rows", "columns", "far rows", "far columns", "scattered")


def check_product(
    a: Tensor, b: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32, accumulate: bool = False
) -> Tensor:
    """One product into memory full of NaN, against float64."""
    rows, columns = a.shape[0], b.shape[1]
    memory = torch.full((rows + 2, columns + 4), GUARD, dtype=dtype)
    c = memory[1:-1, 1 : 1 + columns]
    before = noise(rows, columns, dtype=dtype)
    if accumulate:
        c.copy_(before)
    torch.ops.vim.product_(a, b, bias, accumulate, c)
    exact_b = b.double()
    if a.dtype is torch.bfloat16 and native.capability() == "avx512bf16":
        exact_b = b.bfloat16().double()
    exact, scale = a.double() @ exact_b, a.double().abs() @ exact_b.abs()
    for term in (bias, before if accumulate else None):
        if term is not None:
            exact, scale = exact + term.double(), scale + term.double().abs()
    error = (c.double() - exact).abs()
    # Sums of so few terms lose about the square root of their number in units of float32's last place.
    info = torch.finfo(dtype)
    bound = scale * (6e-8 * (4 + a.shape[1] ** 0.5)) + exact.abs() * (info.eps / 2) + info.smallest_normal * info.eps
    described = (tuple(a.shape), a.stride(), a.dtype, b.stride(), b.dtype, columns, dtype, accumulate)
    assert (error <= bound).all(), (described, float((error - bound).max()))
    outside = memory.isnan().sum().item()
    assert outside == memory.numel() - rows * columns, described
    return c


def check_uses(rows: int, depth: int, columns: int) -> None:
    """Forward, and the gradients of the input and of the weight, with operands among other numbers."""
    types = zip((*FLOATS, torch.bfloat16), (*FLOATS, torch.float32), strict=True)
    for x_type, weight_type in types:
        wide = laid_out(noise(rows, depth, dtype=x_type), "far rows")
        weight = noise(columns, depth, dtype=weight_type)
        dy = laid_out(noise(rows, columns, dtype=x_type), "far rows")
        check_product(wide, weight.t(), noise(columns), x_type)
        check_product(dy, weight, None, x_type)
        check_product(dy.t(), wide, None, weight_type)
        check_product(dy.t(), wide, None, torch.float32, accumulate=True)


def check_layouts() -> None:
    """Every layout and type of both operands, for sizes that fit no tile."""
    types = itertools.cycle(itertools.product(FLOATS, FLOATS, FLOATS))
    for (rows, depth, columns), a_layout, b_layout in itertools.product(
        ((1, 1, 1), (2, 5, 13), (17, 47, 44), (31, 33, 80), (5, 64, 97)), LAYOUTS, LAYOUTS
    ):
        a_type, b_type, c_type = next(types)
        a, b = noise(rows, depth, dtype=a_type), noise(depth, columns, dtype=b_type)
        check_product(laid_out(a, a_layout), laid_out(b, b_layout), noise(columns), c_type)
        check_product(laid_out(a, a_layout), laid_out(b, b_layout), None, c_type, accumulate=True)


def check_sizes() -> None:
    """Sizes around those of vectors, tiles, panels and blocks, in the three uses."""
    for size in (1, 2, 5, 13, 14, 15, 16, 17, 29, 44, 47, 48):
        check_uses(7, 19, size)
        check_uses(size, 18, 33)
        check_uses(6, size, 21)
    for shape in ((197, 44, 48), (1030, 3, 5), (15, 1537, 33)):
        check_uses(*shape)


def check_threads() -> None:
    """The same bits for any number of threads."""
    before = torch.get_num_threads()
    for rows, depth, columns in ((197, 192, 192), (384, 197, 97), (197, 385, 44)):
        for dtype in FLOATS:
            a, b = noise(rows, depth, dtype=dtype), noise(columns, depth, dtype=dtype).t()
            results = []
            for threads in (1, 3):
                torch.set_num_threads(threads)
                results.append([check_product(a, b, None, dtype), check_product(a.t().contiguous().t(), b)])
            torch.set_num_threads(before)
            for other in results[1:]:
                assert all(map(torch.equal, results[0], other)), (rows, depth, columns, dtype)


def check_numbers_stay_apart() -> None:
    """What is not a number, or infinite, stays in its row or its column."""
    for depth in (20, 21):
        for dtype in FLOATS:
            a, b = noise(13, depth, dtype=dtype), noise(37, depth, dtype=dtype).t()
            expected = check_product(a, b)
            a[4, 3], a[7, 5], b[2, 36] = GUARD, float("inf"), GUARD
            c = torch.empty(13, 37)
            torch.ops.vim.product_(a, b, None, False, c)
            assert c[4].isnan().all()
            assert c[:, 36].isnan().all()
            assert c[7, :36].isinf().all()
            rows = [i for i in range(13) if i not in (4, 7)]
            assert torch.equal(c[rows, :36], expected[rows, :36])


def check_empty() -> None:
    """Without depth a product is its bias; without rows or columns it is nothing."""
    c, bias = torch.full((3, 7), GUARD), noise(7)
    torch.ops.vim.product_(noise(3, 0), noise(0, 7), bias, False, c)
    assert torch.equal(c, bias.expand(3, 7))
    torch.ops.vim.product_(noise(3, 0), noise(0, 7), None, True, c)
    assert torch.equal(c, bias.expand(3, 7))
    torch.ops.vim.product_(noise(0, 5), noise(5, 7), None, False, noise(0, 7))
    torch.ops.vim.product_(noise(3, 5), noise(5, 0), None, False, noise(3, 0))


CHECKS = (check_layouts, check_sizes, check_threads, check_numbers_stay_apart, check_empty)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_product(check):
    check()


def test_wrong_operands():
    for a, b, bias, accumulate, c, message in (
        (noise(3), noise(5, 7), None, False, noise(3, 7), "a must be a matrix"),
        (noise(3, 5), noise(5, 7).double(), None, False, noise(3, 7), "b must be a matrix"),
        (noise(3, 4), noise(5, 7), None, False, noise(3, 7), "b has 5 rows, and a 4 columns"),
        (noise(3, 5), noise(5, 7), None, False, noise(3, 8), "c does not have the sizes"),
        (noise(3, 5), noise(5, 7), None, False, noise(7, 3).t(), "side by side"),
        (noise(3, 5), noise(5, 7), noise(6), False, noise(3, 7), "bias does not have the sizes"),
        (noise(3, 5), noise(5, 7), noise(7), True, noise(3, 7), "bias must be float32, and absent"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.vim.product_(a, b, bias, accumulate, c)
