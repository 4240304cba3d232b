"""The classifier at the end of a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vim.layers.watched import DefinedForwards, is_projection
from vim.ops.common.eager import needs_grad
from vim.ops.product.interface import project, runs_projection

_FORWARDS = DefinedForwards((nn.Linear,), ("linear",))


def classify(head: nn.Module, x: Tensor) -> Tensor:
    """Return head(x), (batch, num_classes).

    In inference on a CPU the product of a plain linear layer runs on the threads of the other kernels. PyTorch's
    OpenMP threads would spin for milliseconds after it, beside the next image's blocks: in bfloat16 a fifth of the
    time of one image.

    Args:
        head: The classifier.
        x: Pooled features, (batch, embed_dim).
    """
    if not (isinstance(head, nn.Linear) and runs_projection(x) and _FORWARDS.run()):
        return head(x)
    if not is_projection(head, x.shape[1], head.out_features):
        return head(x)
    weight, bias = head.weight, head.bias
    plain = all(w.dtype is x.dtype and w.device == x.device and w.layout is torch.strided for w in (weight, bias))
    return head(x) if not plain or needs_grad(x, weight, bias) else project(x, weight, bias)
