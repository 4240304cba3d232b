"""Which pixels a class depends on, by the methods of the package captum."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vim.explain.checks import check_classifier, check_gradients, check_images, check_target
from vim.explain.modes import frozen, in_evaluation
from vim.explain.names import PIXEL_METHODS
from vim.layers.checks import check_counts, check_kind

PixelMethod = Literal["saliency", "integrated_gradients", "smoothgrad"]


def pixel_gradients(
    model: nn.Module, images: Tensor, target: Any, method: PixelMethod = "saliency", *, steps: int = 20
) -> Tensor:
    """Return how much each pixel weighs for a class.

    Args:
        model: Any classifier with an attribute `num_classes`; it is run in evaluation mode and left as it was.
        images: Normalised images, (batch, channels, height, width).
        target: The class, counted from 0, or one for each image.
        method: "saliency" (the gradient), "integrated_gradients" (along the way from a black image of zeros) or
            "smoothgrad" (the mean gradient under noise of a tenth of the image's range; seeded, so that calls agree,
            and an image is explained alike alone and among others).
        steps: Steps of the way, or draws of noise.

    Returns:
        (batch, height, width), float32, >= 0: absolute values, summed over channels.

    Raises:
        ModuleNotFoundError: The package captum is not installed.
        RuntimeError: Gradients are off by `torch.inference_mode()`, here or where the model was made.
        TypeError: An argument has the wrong type.
        ValueError: The method is unknown, or the target or the images do not fit the model.
    """
    check_gradients(model)
    check_kind("method", method, PIXEL_METHODS)
    check_counts(1, steps=steps)
    check_images(images, getattr(model, "in_chans", images.shape[1] if isinstance(images, Tensor) else 0))
    classes = torch.tensor(check_target(target, len(images), check_classifier(model)), device=images.device)
    if importlib.util.find_spec("captum") is None:
        raise ModuleNotFoundError('gradients of pixels need captum: pip install "vimamba[explain]"')
    from captum.attr import IntegratedGradients, NoiseTunnel, Saliency

    def run(pixels: Tensor) -> Tensor:  # noise comes in float32
        return model(pixels.to(images.dtype))

    def smooth(pixels: Tensor, classes: Tensor) -> Tensor:
        torch.manual_seed(0)
        low, high = pixels.detach().aminmax()
        spread = float(high - low) / 10
        return NoiseTunnel(Saliency(run)).attribute(
            pixels, target=classes, nt_samples=steps, nt_samples_batch_size=1, stdevs=spread
        )

    generators = torch.random.fork_rng([images.device] if images.is_cuda else [])
    with in_evaluation(model), frozen(model), torch.enable_grad(), generators:
        pixels = images.detach().clone().requires_grad_()
        if method == "saliency":
            weights = Saliency(run).attribute(pixels, target=classes)
        elif method == "integrated_gradients":
            at_a_time = max(len(images), 4)
            weights = IntegratedGradients(run).attribute(
                pixels, target=classes, n_steps=steps, internal_batch_size=at_a_time
            )
        else:
            weights = torch.cat([smooth(*one) for one in zip(pixels.split(1), classes.split(1), strict=True)])
    return weights.detach().abs().sum(1).float()
