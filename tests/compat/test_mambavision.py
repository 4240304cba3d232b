"""NVIDIA's MambaVision from the package index, on our scan: every size, values against the reference, training."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import assert_close
from vim import compat
from vim.ops import default_backend

# The package has no dependency on a GPU of its own, but its metadata asks for mamba-ssm: it is installed without.
pytestmark = pytest.mark.slow
SIZES = ("T", "T2", "S", "B", "L", "L2")


@pytest.fixture(scope="module")
def models():
    with compat.as_mamba_ssm():
        return pytest.importorskip(
            "mambavision.models.mamba_vision",
            reason="needs another package's code: pip install --no-deps mambavision==1.2.0",
        )


@pytest.mark.parametrize("shape", [(224, 224), (192, 288)], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_native_kernels_give_the_logits_of_the_reference(models, size, shape):
    torch.manual_seed(0)
    model = getattr(models, f"mamba_vision_{size}")(resolution=shape).eval()
    images = torch.randn(1, 3, *shape)
    with torch.inference_mode():
        logits = model(images)
        with default_backend("reference"):
            expected = model(images)
    assert_close(logits, expected, 1e-4)


@pytest.mark.parametrize("size", ["T", "L"])
def test_a_training_step_lowers_the_loss(models, size):
    torch.manual_seed(0)
    model = getattr(models, f"mamba_vision_{size}")(num_classes=10, drop_path_rate=0.0).train()
    images, labels = torch.randn(2, 3, 224, 224), torch.tensor([1, 2])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    assert losses[1] < losses[0]
