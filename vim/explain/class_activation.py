"""Class activation maps: where a model sees a class, by the methods of the package grad-cam."""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from vim.explain.checks import check_classifier, check_gradients, check_images, check_target, check_vision_mamba
from vim.explain.modes import frozen, in_evaluation
from vim.explain.names import METHODS
from vim.layers.checks import check_kind
from vim.layers.token_sequence import TokenSequence, class_tokens_first, extract_tokens
from vim.models.vision_mamba import VisionMamba


def class_activation(model: nn.Module, images: Tensor, target: Any, method: str = "gradcam") -> Tensor:
    """Return where a model sees a class, by activations before its last block.

    A class token reads the patches in the blocks only, so the tokens that enter the last block are what is weighed.

    Args:
        model: A `vim.VisionMamba` with a head; it is run in evaluation mode and left as it was.
        images: Normalised images, (batch, in_chans, height, width).
        target: The class, counted from 0, or one for each image.
        method: "gradcam", "gradcam++", "hirescam", "xgradcam", "layercam", "elementwise", "eigengradcam" or
            "eigencam".

    Returns:
        (batch, height, width), float32, from 0 to 1, of the images' size.

    Raises:
        ModuleNotFoundError: The package grad-cam is not installed.
        RuntimeError: Gradients are off by `torch.inference_mode()`, here or where the model was made.
        TypeError: The model or an argument has the wrong type.
        ValueError: The method is unknown, or the target or the images do not fit the model.
    """
    vision = check_vision_mamba(model)
    check_gradients(model)
    check_kind("method", method, tuple(METHODS))
    check_images(images, vision.in_chans)
    classes = check_target(target, len(images), check_classifier(vision))
    if vision.depth == 1 and vision.pairwise_layers:
        raise ValueError("model must have a block that it runs, and its only layer has no partner")
    package = import_grad_cam()
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    tapped = _BeforeLastBlock(vision)
    targets: Any = [ClassifierOutputTarget(c) for c in classes]
    with in_evaluation(vision), frozen(vision), torch.enable_grad(), contextlib.ExitStack() as hooks:
        cam = getattr(package, METHODS[method])(tapped, [tapped.tap], tapped.as_pictures)
        hooks.callback(cam.activations_and_grads.release)  # as a context manager, cam would swallow an IndexError
        cam.get_target_width_height = tapped.covered_size
        maps = cam(images.detach().clone().requires_grad_(), targets)
    height, width = images.shape[2:]
    return torch.from_numpy(maps).float()[:, :height, :width]


def import_grad_cam() -> Any:
    """Return the package grad-cam.

    Raises:
        ModuleNotFoundError: It is not installed, or lacks a library of the system, as opencv does without libGL.
    """
    if importlib.util.find_spec("pytorch_grad_cam") is None:
        raise ModuleNotFoundError('class activation maps need grad-cam: pip install "vimamba[explain]"')
    try:
        import pytorch_grad_cam
    except ImportError as error:
        raise ModuleNotFoundError(f"class activation maps need grad-cam, and it cannot be imported: {error}") from error
    return pytorch_grad_cam


class _BeforeLastBlock(nn.Module):
    """A model whose tokens pass a module of their own before its last block.

    Args:
        model: The model; nothing of it is changed.
    """

    def __init__(self, model: VisionMamba) -> None:
        super().__init__()
        self.model = model
        self.tap = nn.Identity()
        self._sequence: TokenSequence | None = None

    def forward(self, images: Tensor) -> Tensor:
        model = self.model
        step = 2 if model.pairwise_layers else 1
        run = model.depth - model.depth % step
        x, self._sequence = model._embed(images, None, None)
        x, residual, _ = model._run_layers(x, self._sequence, run - step)
        tokens = x if residual is None else x + residual
        # grad-cam reads them as NumPy arrays, which have no bfloat16.
        tokens = self.tap(tokens.to(torch.promote_types(torch.float32, tokens.dtype))).to(x.dtype)
        x, residual, _ = model._run_layers(tokens, self._sequence, run, start=run - step)
        x, _ = model.norm_f(x, residual)
        return model.forward_head(class_tokens_first(x, self._sequence.read_out()))

    def covered_size(self, _: Tensor) -> tuple[int, int]:
        """Return width and height of what the patches cover: of images that the model pads, more than the image."""
        assert self._sequence is not None, "grad-cam asks for the size after it has run the model"
        height, width = self.model.patch_embed.covered_size(self._sequence.grid)
        return width, height

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Leave the gradients of the user's model alone; grad-cam would clear them."""

    def as_pictures(self, tokens: Tensor) -> Tensor:
        """Return the patches among tokens in scan order, (batch, dim, rows, columns)."""
        assert self._sequence is not None, "grad-cam reshapes activations after it has run the model"
        _, patches = extract_tokens(self._sequence.undo(tokens), self._sequence.places)
        return patches.mT.unflatten(2, self._sequence.grid)
