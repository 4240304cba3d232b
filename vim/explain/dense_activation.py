"""Class activation maps of segmentation models and detectors: which cells decide for the pixels of a class, or a box.

The heads of these models read maps of the backbone. The maps of an image and the gradients of scores by them are taken
here, and the methods of the package grad-cam weigh them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim.explain.cells import Cells, cut_to_image
from vim.explain.checks import check_gradients, check_images, check_target
from vim.explain.class_activation import METHODS, import_grad_cam
from vim.explain.modes import frozen, in_evaluation, of_this_thread
from vim.inference.detection_pictures import confident
from vim.layers.checks import check_counts, check_kind
from vim.models.detection import Detector
from vim.models.segmentation import Segmenter


@dataclass(frozen=True)
class DenseActivation:
    """Maps of a backbone, with the gradients of scores by them.

    Attributes:
        activations: (channels, rows, columns): the maps that the heads read, one after the other.
        gradients: (scores, channels, rows, columns).
        size: Height and width in pixels of what the cells cover, from the image's first pixel on.
        shape: Height and width of the image in pixels.
    """

    activations: Tensor
    gradients: Tensor
    size: tuple[int, int]
    shape: tuple[int, int]

    def maps(self, method: str = "gradcam") -> Tensor:
        """Return where the image decides for each score.

        Args:
            method: A method of `class_activation`. "eigencam" needs no gradients and is the same for all scores.

        Returns:
            (scores, height, width), float32, from 0 to 1, of the image's size.

        Raises:
            ModuleNotFoundError: The package grad-cam is not installed.
            ValueError: The method is unknown.
        """
        check_kind("method", method, tuple(METHODS))
        # grad-cam asks for a model to run, and it has run already.
        cam = getattr(import_grad_cam(), METHODS[method])(model=nn.Linear(1, 1), target_layers=[])
        activations = self.activations[None].float().cpu().numpy()
        weighed = [
            cam.get_cam_image(None, None, None, activations, gradient[None].float().cpu().numpy(), False)
            for gradient in self.gradients
        ]
        cells = torch.from_numpy(np.stack(weighed)).float().clamp_min(0)
        pixels = cut_to_image(cells[:, 0], self.size, self.shape)
        return pixels / pixels.amax((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def segment_activation(
    model: nn.Module,
    windows: Sequence[Tensor],
    starts: Sequence[tuple[int, int]],
    labels: Tensor,
    classes: Sequence[int],
) -> DenseActivation:
    """Take the maps of a segmentation model, and the gradients of the scores of classes by them.

    The score of a class is the sum of its logits over the pixels that are predicted as the class. Logits are means of
    the windows that share a pixel, so the score is a sum over windows. One window at a time is in memory.

    Args:
        model: A segmentation model of `vim`; it is run in evaluation mode and left as it was.
        windows: Normalised parts of an image, (in_chans, height, width) each, all of the model's size.
        starts: First row and first column of each window in the image.
        labels: Predicted class of each pixel of the image, (height, width). Windows may reach beyond it.
        classes: The classes to explain, counted from 0.

    Raises:
        ModuleNotFoundError: The package grad-cam is not installed.
        RuntimeError: Gradients are off by `torch.inference_mode()`, here or where the model was made.
        TypeError: The model or an argument has the wrong type.
        ValueError: There is no window or no class, a class is out of range, or it is predicted nowhere.
    """
    if not isinstance(model, Segmenter):
        raise TypeError(f"model must be a segmentation model of vim, got {type(model).__name__}")
    check_gradients(model)
    if not windows or len(windows) != len(starts):
        raise ValueError(f"windows must be at least one with a start each, got {len(windows)} and {len(starts)} starts")
    check_images(torch.stack(list(windows)), model.backbone.model.in_chans)
    chosen = check_target(list(classes), len(classes), model.num_classes)
    absent = [c for c in chosen if not bool((labels == c).any())]
    if absent or not chosen:
        raise ValueError(f"classes must be predicted in the image, got {absent[0] if absent else 'none'}")
    import_grad_cam()
    from pytorch_grad_cam.utils.model_targets import SemanticSegmentationTarget

    height, width = windows[0].shape[-2:]
    activations, gradients = (Cells((height, width), starts) for _ in range(2))
    weights = _pixel_weights(labels, chosen, activations)
    with in_evaluation(model), frozen(model), torch.enable_grad():
        for window, (top, left) in zip(windows, starts, strict=True):
            with _read_by(model.backbone.resize) as maps:
                logits = model(window[None])[0]
            here = weights[:, top : top + height, left : left + width]
            scores = [
                SemanticSegmentationTarget(c, weight.numpy())(logits) for c, weight in zip(chosen, here, strict=True)
            ]
            gradients.add((top, left), torch.stack([_gradient(score, maps) for score in scores]))
            activations.add((top, left), torch.cat([m[0].detach() for m in maps]))
    return DenseActivation(activations.mean(), gradients.sum(), activations.size, (labels.shape[0], labels.shape[1]))


def box_activation(
    model: nn.Module, image: Tensor, number: int = 5, label: int | None = None, score: float = 0.5
) -> tuple[dict[str, Tensor], DenseActivation]:
    """Take the maps of a detector, and the gradients of the scores of boxes by them.

    Args:
        model: A detector of `vim`; it is run in evaluation mode and left as it was.
        image: Pixels from 0 to 1, (in_chans, height, width), of any size.
        number: The most boxes to explain.
        label: Explain the boxes of one class, counted from 1; `None` takes all classes.
        score: Leave out boxes with a lower score.

    Returns:
        `boxes`, `labels`, `scores` and, if the model predicts them, `masks` of the explained objects, as
        `ObjectFinder.find` returns them; and the activation, at the size in which the model sees the image.

    Raises:
        RuntimeError: Gradients are off by `torch.inference_mode()`, here or where the model was made.
        TypeError: The model or an argument has the wrong type.
        ValueError: An argument is out of range, or there is no such box.
    """
    if not isinstance(model, Detector):
        raise TypeError(f"model must be a detector of vim, got {type(model).__name__}")
    check_gradients(model)
    check_counts(1, number=number)
    check_images(image[None], len(model.transform.image_mean))
    with in_evaluation(model), frozen(model), torch.enable_grad(), _read_by(model.backbone.levels) as maps:
        found = confident(model([image])[0], score)
        of_class = torch.arange(len(found["labels"])) if label is None else (found["labels"] == label).nonzero()[:, 0]
        chosen = of_class[:number].to(found["labels"].device)
        if not len(chosen):
            of = "" if label is None else f" of class {label}"
            raise ValueError(f"image must have an object{of} with a score of at least {score}")
        gradients = torch.stack([_gradient(found["scores"][i], maps) for i in chosen.tolist()])
        activations = torch.cat([m[0].detach() for m in maps])
        seen: Any = model.transform.resize(image)[0]
    objects = {name: values.detach()[chosen].cpu() for name, values in found.items()}
    size, shape = model.transform.image_shape, (seen.shape[-2], seen.shape[-1])
    return objects, DenseActivation(activations, gradients, size, shape)


def _pixel_weights(labels: Tensor, classes: Sequence[int], cells: Cells) -> Tensor:
    """Return the weight of the logit of each pixel in the score of each class, (classes, height, width)."""
    height, width = cells.size
    padded = F.pad(labels.cpu(), (0, width - labels.shape[1], 0, height - labels.shape[0]), value=-1)
    return torch.stack([padded == c for c in classes]) / cells.windows_at_pixels()


@contextlib.contextmanager
def _read_by(modules: Any) -> Iterator[list[Tensor]]:
    """Collect the maps that modules read while the model runs, each map once.

    Gradients begin at the maps: the graph of the backbone is not needed.
    """
    maps: list[Tensor] = []
    given: list[Tensor] = []

    def take(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        for known, leaf in zip(given, maps, strict=True):
            if known is inputs[0]:
                return (leaf,)
        given.append(inputs[0])
        maps.append(inputs[0].detach().requires_grad_())
        return (maps[-1],)

    with contextlib.ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(of_this_thread(take)).remove)
        yield maps


def _gradient(score: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """Return the gradient of a score by maps, (channels of all maps, rows, columns)."""
    found = torch.autograd.grad(score, list(maps), retain_graph=True, materialize_grads=True)
    return torch.cat([gradient[0] for gradient in found])
