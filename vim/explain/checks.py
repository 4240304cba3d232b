"""What the functions of `vim.explain` accept: errors name the argument and the value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vim.layers import Mamba
from vim.models.vision_mamba import VisionMamba


def check_vision_mamba(model: nn.Module) -> VisionMamba:
    """Return the model.

    Raises:
        TypeError: It is another kind of model, or a compiled one.
    """
    if hasattr(model, "_orig_mod"):
        raise TypeError("model must be the model itself, not what torch.compile returned: pass model._orig_mod")
    if not isinstance(model, VisionMamba):
        raise TypeError(f"model must be a vim.VisionMamba, got {type(model).__name__}")
    return model


class NothingToExplainError(ValueError):
    """An image in which a model predicts nothing to explain."""


def check_methods(methods: Sequence[str], known: Sequence[str], task: str) -> None:
    """Raise `ValueError` unless there is a method and the explanations of a task include all methods."""
    unknown = [method for method in methods if method not in known]
    if unknown or not methods:
        got = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"method must be one of {list(known)} for task {task!r}, got {got}")


def class_number(target: str, class_names: Sequence[str]) -> int:
    """Return the number of a class that is given by its name or its number.

    Raises:
        ValueError: There is no such class.
    """
    if target in class_names:
        return class_names.index(target)
    if target.isdecimal() and int(target) < len(class_names):
        return int(target)
    shown = ", ".join(class_names[:10]) + (", ..." if len(class_names) > 10 else "")
    raise ValueError(
        f"target must be a class name or a number from 0 to {len(class_names) - 1}, got {target!r}: {shown}"
    )


def check_images(images: Tensor, in_chans: int) -> None:
    """Check a batch of normalised images.

    Raises:
        TypeError: `images` is not a floating tensor.
        ValueError: It has another number of axes or channels, or holds no image.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a floating tensor, got {got}")
    if images.dim() != 4 or images.shape[1] != in_chans or 0 in images.shape:
        raise ValueError(
            f"images must be (batch, {in_chans}, height, width) with at least one image, got {tuple(images.shape)}"
        )


def check_gradients(model: nn.Module) -> None:
    """Check that gradients can pass through a model here.

    Raises:
        RuntimeError: The caller is inside `torch.inference_mode()`, or a parameter was made there.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("gradients are needed, and torch.inference_mode() has none: call this outside of it")
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise RuntimeError(
                f"gradients are needed, and the parameter {name} was made inside torch.inference_mode(): build, load "
                "and resize the model outside of it"
            )


def check_target(target: Any, batch: int, num_classes: int) -> list[int]:
    """Return the class to explain for each image.

    Args:
        target: A class for all images, one for each image in a list or a tensor, both counted from 0.
        batch: Number of images.
        num_classes: Number of the model's classes.

    Raises:
        TypeError: A class is not a whole number.
        ValueError: A class is out of range, the number of classes is not that of images, or the model has no head.
    """
    if num_classes < 1:
        raise ValueError("model must have a head to explain a class, and its num_classes is 0")
    values = target.tolist() if isinstance(target, Tensor) else target
    classes = list(values) if isinstance(values, (list, tuple)) else [values] * batch
    if any(isinstance(c, bool) or not isinstance(c, int) for c in classes):
        raise TypeError(f"target must be a class number, or a list of one for each image, got {target!r}")
    if len(classes) != batch:
        raise ValueError(f"target must hold one class for each of {batch} images, got {len(classes)}")
    wrong = [c for c in classes if not 0 <= c < num_classes]
    if wrong:
        raise ValueError(f"target must be from 0 to {num_classes - 1}, got {wrong[0]}")
    return classes


def check_layers(layers: Any, depth: int) -> tuple[int, ...]:
    """Return the numbers of the layers, counted from 0; negative numbers count from the end, `None` is all.

    Raises:
        TypeError: A layer is not a whole number.
        ValueError: A layer is out of range, or the list is empty.
    """
    chosen = (
        list(range(depth)) if layers is None else list(layers) if isinstance(layers, (list, tuple, range)) else [layers]
    )
    if any(isinstance(i, bool) or not isinstance(i, int) for i in chosen):
        raise TypeError(f"layers must be a number, a list of numbers or None, got {layers!r}")
    wrong = [i for i in chosen if not -depth <= i < depth]
    if wrong:
        raise ValueError(f"layers must be from {-depth} to {depth - 1}, got {wrong[0]}")
    if not chosen:
        raise ValueError("layers must name at least one layer, got an empty list")
    return tuple(i % depth for i in chosen)


def mixers_of(model: VisionMamba, layers: tuple[int, ...]) -> dict[int, Mamba]:
    """Return the mixers of the layers.

    Raises:
        TypeError: A mixer is another module.
    """
    mixers = {i: model.layers[i].mixer for i in layers}
    for i, mixer in mixers.items():
        if not isinstance(mixer, Mamba):
            kind = type(mixer).__name__
            raise TypeError(f"the mixer of layer {i} must be a vim.Mamba to have hidden attention, got {kind}")
    return mixers  # type: ignore[return-value]
