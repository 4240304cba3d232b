"""Settings of the tests on a GPU."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and convolutions of PyTorch in float32 proper: TF32, cuDNN's default, has errors of 1e-3."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
