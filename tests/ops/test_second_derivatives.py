"""Derivatives of gradients (create_graph=True: penalties, Hessians, second-order optimisers) and forward-mode ones."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.autograd import forward_ad, gradgradcheck
from torch.func import functional_call, grad, jvp

import vim
from tests.helpers import make_bidirectional_inputs, make_scan_inputs
from vim.ops import (
    ScanOperands,
    add_rms_norm,
    bidirectional_conv1d,
    bidirectional_scan,
    causal_conv1d,
    default_backend,
    selective_scan,
)


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def _scan(reverse: bool, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return selective_scan(*tensors, delta_softplus=True, return_last_state=True, reverse=reverse)


def _bidirectional_scan(*tensors: torch.Tensor) -> torch.Tensor:
    return bidirectional_scan(ScanOperands(*tensors[:6]), ScanOperands(*tensors[6:12]), tensors[12])


def _from_one_tensor(x: torch.Tensor) -> torch.Tensor:
    """Operands that are made from one another, as in a block: each must count for itself alone."""
    y, r = add_rms_norm(x, x.sin(), x[0, 0])
    u, u_b = bidirectional_conv1d(y, r[0, :, :2], y[0, 0], r[0, :, 2:4], None)
    rows = torch.cat([u, u_b], -1)[..., :5]
    side = (u, rows, u[0, :, :1], y[0, 0], r[0, :, :2].sin(), u_b[0, 0])
    return bidirectional_scan(ScanOperands(*side), ScanOperands(u_b, rows.sin(), *side[2:]), y)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda x, r, w: add_rms_norm(x, r, w), ((2, 3, 4), (2, 3, 4), (4,))),
        (lambda x, w: add_rms_norm(x, None, w)[0], ((2, 3, 4), (4,))),
        (functools.partial(bidirectional_conv1d), ((2, 5, 3), (3, 4), (3,), (3, 2), (3,))),
        (lambda x, w, w_b: bidirectional_conv1d(x, w, None, w_b, None)[1], ((2, 5, 3), (3, 4), (3, 2))),
        (lambda x, w, b: causal_conv1d(x, w, b, "silu", reverse=True), ((2, 3, 5), (3, 4), (3,))),
        (_from_one_tensor, ((1, 4, 4),)),
    ],
)
def test_numerically(function, shapes):
    torch.manual_seed(0)
    assert gradgradcheck(function, tuple(_normal(*shape) for shape in shapes))


@pytest.mark.parametrize("reverse", [False, True])
def test_of_scans_numerically(reverse):
    inputs = make_scan_inputs(1, 2, 4, 2, torch.float64)
    assert gradgradcheck(functools.partial(_scan, reverse), tuple(inputs.values()))
    assert gradgradcheck(lambda u, delta, *maps: selective_scan(u, delta, *maps), tuple(inputs.values())[:5])
    if not reverse:
        assert gradgradcheck(_bidirectional_scan, tuple(make_bidirectional_inputs(1, 3, 2, 2, 1, torch.float64)))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_penalty_on_gradients_reaches_every_weight(mode, backend, frozen):
    """In float32, as models run, against torch.func's derivatives in float64."""
    torch.manual_seed(0)
    model = vim.VisionMamba(img_size=32, embed_dim=24, depth=2, d_state=4, num_classes=3, drop_path_rate=0.0)
    getattr(model, mode)()
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    if frozen:
        for name in ("A_log", "dt_proj.bias", "conv1d_b.weight", "in_proj.weight"):
            model.layers[0].mixer.get_parameter(name).requires_grad_(False)
    with default_backend(backend):
        (gradient,) = torch.autograd.grad(model(images).square().sum(), images, create_graph=True)
        gradient.square().sum().backward()
    actual = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    weights = {name: p.detach() for name, p in model.double().named_parameters()}

    def penalty(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = grad(lambda x: functional_call(model, weights, (x,)).square().sum())
        return loss(images.detach().double()).square().sum()

    expected = grad(penalty)(weights)
    for name, value in actual.items():
        scale = expected[name].abs().max().clamp_min(1e-3)
        if value is None:
            assert expected[name].abs().max() == 0, name
        else:
            assert (value.double() - expected[name]).abs().max() <= 2e-5 * scale, name


@pytest.mark.parametrize("recorded", [False, True])
def test_forward_mode(recorded):
    torch.manual_seed(0)
    model = vim.VisionMamba(img_size=32, embed_dim=24, depth=2, d_state=4, num_classes=3).eval()
    images, direction = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    with torch.set_grad_enabled(recorded), forward_ad.dual_level():
        logits, tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(images, direction)))
    expected_logits, expected = jvp(model.double(), (images.double(),), (direction.double(),))
    assert (logits - expected_logits).abs().max() < 1e-5
    assert (tangent - expected).abs().max() < 1e-5 * expected.abs().max()
