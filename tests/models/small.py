"""A model small enough for tests, and images for it."""

from __future__ import annotations

from typing import Any

import torch

import vim

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_classes": 10, "d_state": 4}


def small(**kwargs: Any) -> vim.VisionMamba:
    """A model of three blocks over 4 x 4 patches."""
    torch.manual_seed(0)
    return vim.VisionMamba(**{**SIZES, **kwargs})


def images(*size: int) -> torch.Tensor:
    """Two random images."""
    return torch.randn(2, 3, *(size or (32, 32)), generator=torch.Generator().manual_seed(1))
