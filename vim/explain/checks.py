"""What the functions of `vim.explain` accept: errors name the argument and the value."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vim.data.decoding import BAD_IMAGE, describe_bad_image
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
        raise TypeError(f"model must be a vim.VisionMamba, got {kind_of(model)}")
    return model


def check_classifier(model: nn.Module) -> int:
    """Return the number of classes of a model.

    Raises:
        TypeError: The model does not say how many classes it has.
        ValueError: It has no head, or returns logits for each token and not for the image.
    """
    if not hasattr(model, "num_classes"):
        raise TypeError(f"model must be a classifier with an attribute num_classes, got {kind_of(model)}")
    num_classes: Any = model.num_classes
    if num_classes < 1:
        raise ValueError("model must have a head to explain a class, and its num_classes is 0")
    if getattr(model, "global_pool", None) == "":
        raise ValueError("model must pool its tokens to explain a class, and its global_pool is ''")
    return int(num_classes)


def kind_of(model: Any) -> str:
    """Return the name of a model's class, and what to pass instead of a model that is wrapped for training."""
    wrapped = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    return type(model).__name__ + (": pass model.module" if wrapped else "")


class NothingToExplainError(ValueError):
    """An image that cannot be used, or in which a model predicts nothing to explain."""


@contextlib.contextmanager
def using_image() -> Iterator[None]:
    """Raise `NothingToExplainError`, with the reason, if an image cannot be read or converted for a model."""
    try:
        yield
    except BAD_IMAGE as error:
        raise NothingToExplainError(describe_bad_image(error)) from error


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
    numbers = [str(number) for number in range(len(class_names))]
    if target in numbers:
        return numbers.index(target)
    shown = ", ".join(class_names[:10]) + (", ..." if len(class_names) > 10 else "")
    raise ValueError(
        f"target must be a class name or a number from 0 to {len(class_names) - 1}, got {target!r}: {shown}"
    )


def check_images(images: Tensor, in_chans: int) -> None:
    """Check a batch of normalised images.

    Raises:
        TypeError: `images` is not a floating tensor.
        ValueError: It has another number of axes or channels, holds no image, or has pixels that are not finite.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a floating tensor, got {got}")
    if images.dim() != 4 or images.shape[1] != in_chans or 0 in images.shape:
        raise ValueError(
            f"images must be (batch, {in_chans}, height, width) with at least one image, got {tuple(images.shape)}"
        )
    if not bool(torch.stack(images.aminmax()).isfinite().all()):  # without a tensor as large as the images
        raise ValueError("images must be finite, got pixels that are infinite or not a number")


def check_gradients(model: nn.Module) -> None:
    """Check that gradients can pass through a model here.

    Raises:
        RuntimeError: The caller is inside `torch.inference_mode()`, or a parameter was made there.
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
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
        target: A class for all images, or one for each image in a list, an array or a tensor; counted from 0.
        batch: Number of images.
        num_classes: Number of the model's classes.

    Raises:
        TypeError: A class is not a whole number.
        ValueError: A class is out of range, or there are more or fewer classes than images.
    """
    values = _as_numbers(target)
    classes = values if isinstance(values, list) else [values] * batch
    if not all(map(_is_whole, classes)):
        raise TypeError(f"target must be a class number, or a list of one for each image, got {target!r}")
    if len(classes) != batch:
        raise ValueError(f"target must hold one class for each of {batch} images, got {len(classes)}")
    wrong = [c for c in classes if not 0 <= c < num_classes]
    if wrong:
        raise ValueError(f"target must be from 0 to {num_classes - 1}, got {wrong[0]}")
    return classes


def check_layers(layers: Any, depth: int) -> tuple[int, ...]:
    """Return the numbers of the layers, counted from 0; negative numbers count from the end.

    Raises:
        TypeError: A layer is not a whole number.
        ValueError: A layer is out of range, or the list is empty.
    """
    values = _as_numbers(layers)
    chosen = values if isinstance(values, list) else [values]
    if not all(map(_is_whole, chosen)):
        raise TypeError(f"layers must be a number, a list of numbers or None, got {layers!r}")
    wrong = [i for i in chosen if not -depth <= i < depth]
    if wrong:
        raise ValueError(f"layers must be from {-depth} to {depth - 1}, got {wrong[0]}")
    if not chosen:
        raise ValueError("layers must name at least one layer, got an empty list")
    return tuple(i % depth for i in chosen)


def _as_numbers(values: Any) -> Any:
    """Return a list of Python's numbers for a list, an array or a tensor, and anything else as one value."""
    if isinstance(values, (list, tuple, range)):
        return [_as_numbers(value) for value in values]
    return values.tolist() if isinstance(values, (Tensor, np.ndarray, np.generic)) else values


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
