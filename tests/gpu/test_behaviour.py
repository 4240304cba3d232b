"""What only a GPU can show: streams, devices, CUDA graphs, autocast, compilation, launches, synchronisation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import timm
import torch
from torch.profiler import ProfilerActivity, profile

import vim
from tests.gpu.device import DEVICE, needs_gpu, require
from tests.helpers import assert_close
from vim.ops import default_backend

pytestmark = needs_gpu


@pytest.fixture(autouse=True)
def _native() -> None:
    require("native", "bidirectional_scan")


@pytest.fixture
def mixer() -> vim.Mamba:
    torch.manual_seed(0)
    return vim.Mamba(96, device=DEVICE)


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vim_tiny_patch16_224", img_size=64, depth=4).eval().to(DEVICE)


def tokens(seed: int = 0, device: torch.device = DEVICE) -> torch.Tensor:
    return torch.randn(2, 65, 96, generator=torch.Generator().manual_seed(seed)).to(device)


def images(seed: int = 0, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def test_current_stream(mixer):
    """The input is made late on a stream of its own: a kernel on another stream would read what was there before."""
    expected = mixer(tokens())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    source, target = tokens(), torch.zeros_like(tokens()).requires_grad_()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            target.copy_(source)
        out = mixer(target)
        out.sum().backward()
    stream.synchronize()
    assert torch.equal(out, expected)
    assert target.grad.isfinite().all()


def test_another_device_than_the_current_one(mixer):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    other = torch.device("cuda", 1)
    expected = mixer(tokens())
    x = tokens(device=other).requires_grad_()
    out = mixer.to(other)(x)
    out.sum().backward()
    assert torch.cuda.current_device() == 0
    assert out.device == x.grad.device == other
    assert_close(out.cpu(), expected.cpu(), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graph(model, dtype):
    model = model.to(dtype)
    with torch.no_grad():
        wanted = [model(images(seed).to(dtype)) for seed in (1, 2)]
    graphed = vim.graphed(model, images().to(dtype))
    got = [graphed(images(seed).to(dtype)) for seed in (1, 2)]
    for actual, expected in zip(got, wanted, strict=True):
        assert torch.equal(actual, expected)


def test_a_cuda_graph_reads_changed_weights(model):
    graphed = vim.graphed(model, images())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
        assert torch.equal(graphed(images(1)), model(images(1)))


def test_what_a_cuda_graph_cannot_be_of(model):
    with pytest.raises(ValueError, match="model must be on the example's device, cuda:0; got cpu"):
        vim.graphed(torch.nn.Linear(3, 3).eval(), images())
    with pytest.raises(ValueError, match=r"evaluation mode; call model\.eval"):
        vim.graphed(model.train(), images())


def test_a_training_step_as_a_cuda_graph(mixer):
    def step(x: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(mixer(x).square().sum(), mixer.parameters()))

    static, stream = tokens(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = step(static)
    static.copy_(tokens(5))
    graph.replay()
    for got, wanted in zip(results, step(tokens(5)), strict=True):
        assert_close(got, wanted, 1e-5)


def test_the_host_never_waits(model):
    """Forward and backward ask nothing of the GPU."""
    x = images().requires_grad_()
    model(x).sum().backward()  # what happens once may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).sum().backward()
        with torch.no_grad():
            model(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(model, dtype):
    x = images()
    with default_backend("reference"):
        expected = model(x)
        wanted = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    with torch.autocast("cuda", dtype):
        actual = model(x)
    assert_close(actual.float(), expected, 2e-2)
    grads = torch.autograd.grad(actual.float().square().sum(), list(model.parameters()))
    for grad, reference in zip(grads, wanted, strict=True):
        assert grad.dtype == torch.float32
        assert_close(grad, reference, 5e-2)


def test_backward_within_autocast(mixer):
    """Gradients are what they are outside the region: products of the scan's backward pass stay in float32."""
    with torch.autocast("cuda", torch.bfloat16):
        out = mixer(tokens()).float().square().sum()
        within = torch.autograd.grad(out, list(mixer.parameters()), retain_graph=True)
    outside = torch.autograd.grad(out, list(mixer.parameters()))
    for grad, wanted in zip(within, outside, strict=True):
        assert_close(grad, wanted, 2e-2)


def _launches(model: torch.nn.Module, x: torch.Tensor) -> Iterator[str]:
    with torch.no_grad():
        model(x)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
            model(x)
            torch.cuda.synchronize()
    kernels = (e.name for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return (name for name in kernels if not any(part in name.lower() for part in LIBRARY_PARTS))


# Second kernels of one product: whether cuBLAS cuts it along its depth is the library's choice.
LIBRARY_PARTS = ("splitk", "split_k", "reduce_1block", "memset")


def test_launches_of_a_layer():
    """At most 8, counted as the difference that one more layer makes, without the second kernels of products."""
    counts, names = [], []
    for depth in (2, 3):
        model = timm.create_model("vim_tiny_patch16_224", img_size=64, depth=depth).eval().to(DEVICE, torch.bfloat16)
        names = list(_launches(model, images().to(torch.bfloat16)))
        counts.append(len(names))
    assert counts[1] - counts[0] <= 8, names


def test_memory_kept_for_the_backward_pass():
    """xz, x_dbl and entry states of the mixer, the norm's input and output: not the convolutions."""
    tokens, batch, depth = 197, 16, 4
    model = timm.create_model("vim_tiny_patch16_224", depth=depth).eval().to(DEVICE)
    x = torch.randn(batch, 3, 224, 224, device=DEVICE)
    with torch.autocast("cuda", torch.bfloat16):
        model(x).sum().backward()
        model.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated()
        loss = model(x).sum()
    kept = torch.cuda.memory_allocated() - before
    kept /= depth * batch * tokens * 192 * 2  # bfloat16 numbers a token and channel
    del loss
    # 4 of xz, 2.6 of entry states, 2.5 of the residual, 0.5 of x_dbl, and small things; the convolutions would add 4.
    assert kept < 11, kept


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(mixer, mode):
    expected = mixer(tokens())
    compiled = torch.compile(mixer, fullgraph=True, mode=mode)
    with torch.no_grad():
        for _ in range(3):
            out = compiled(tokens()).clone()
    assert_close(out, expected, 1e-5)


def test_compiled_training(mixer):
    x = tokens().requires_grad_()
    wanted = torch.autograd.grad(mixer(x).square().sum(), [x, *mixer.parameters()])
    compiled = torch.compile(mixer, fullgraph=True)
    got = torch.autograd.grad(compiled(x).square().sum(), [x, *mixer.parameters()])
    for a, b in zip(got, wanted, strict=True):
        assert_close(a, b, 1e-4)
