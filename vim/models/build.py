"""Build the model that the settings name."""

import dataclasses
import difflib
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn

import vim.models  # registers our models with timm
from vim.config.schema import ModelConfig, TrainConfig
from vim.models.starting_weights import load_starting_weights

_HUB = ("hf-hub:", "hf_hub:")
_FROM_ELSEWHERE = (*_HUB, "local-dir:")


def build_model(config: ModelConfig, num_classes: int, class_names: Sequence[str] | None = None) -> nn.Module:
    """Create a model through timm.

    Args:
        config: The model's settings, without regard to their `num_classes`.
        num_classes: Outputs of the classifier.
        class_names: Names of the classes; if `model.checkpoint` has others, its classifier is not used.

    Returns:
        The model, on the CPU, in training mode.

    Raises:
        ValueError: timm does not know the model (the message names the nearest), the model refuses an argument, it has
            no published weights, or `model.checkpoint` does not fit.
        FileNotFoundError: The file `model.checkpoint` does not exist.
    """
    check_model_name(config.name)
    arguments: dict[str, Any] = {
        "num_classes": num_classes,
        "in_chans": config.in_chans,
        "img_size": config.img_size,
        "drop_rate": config.drop_rate,
        "drop_path_rate": config.drop_path_rate,
        **config.args,
    }
    if config.checkpoint is not None:
        model = _create(without_weights(config), arguments)
        load_starting_weights(model, config, class_names)
        return model
    if config.pretrained and _is_ours(config.name):
        weights = "ema" if config.pretrained_weights == "ema" else "raw"
        arguments |= {"pretrained_weights": weights, "pretrained_resampling": config.pretrained_resampling}
    return _create(config, arguments)


def without_weights(config: ModelConfig) -> ModelConfig:
    """Return the settings of the same model without pretrained weights or a checkpoint."""
    return dataclasses.replace(config, pretrained=False, checkpoint=None)


def _is_ours(name: str) -> bool:
    return timm.is_model(name) and timm.model_entrypoint(name).__module__.startswith("vim.")


def create_named(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
    """Create a model of timm, without `img_size` if the model has no such argument.

    Raises:
        TypeError: The model does not take an argument, or refuses its type.
        ValueError: The model refuses a value, or its weights are not available.
    """
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except TypeError as error:
        if "img_size" in arguments and "'img_size'" in str(error):
            del arguments["img_size"]
            return create_named(name, pretrained, **arguments)
        raise
    except LocalEntryNotFoundError as error:
        raise ValueError("it is not in the Hugging Face cache, and was not fetched") from error
    except (RuntimeError, AssertionError, AttributeError, LookupError, ArithmeticError) as error:
        reason = " ".join(str(error).split()) or f"{type(error).__name__} without a reason"
        raise ValueError(reason) from error


def _create(config: ModelConfig, arguments: dict[str, Any]) -> nn.Module:
    try:
        return create_named(config.name, config.pretrained, **arguments)
    except TypeError as error:
        raise ValueError(f"model.args does not fit model.name {config.name!r}: {error}{_nearest(error)}") from error
    except ValueError as error:
        raise ValueError(f"model.name {config.name!r} cannot be created with these model.args: {error}") from error


def _nearest(error: TypeError) -> str:
    """Return the argument of our models nearest to an unknown one, as a question."""
    unknown = re.search(r"VisionMamba.* unexpected keyword argument '(\w+)'", str(error))
    near = (
        difflib.get_close_matches(unknown[1], inspect.signature(vim.models.VisionMamba).parameters, n=1)
        if unknown
        else []
    )
    return f": did you mean {near[0]!r}?" if near else ""


def without_download(config: ModelConfig) -> ModelConfig:
    """Return the settings of the same model, built from the cache of Hugging Face instead of from its hub.

    Raises:
        ValueError: The model is one of the hub, and its description is not in the cache.
    """
    source, _, repository = config.name.partition(":")
    if f"{source}:" not in _HUB:
        return config
    name, _, revision = repository.partition("@")
    description = try_to_load_from_cache(name, "config.json", revision=revision or None)
    if not isinstance(description, str):
        raise ValueError(f"model.name {config.name!r} is not in the cache of Hugging Face, and was not fetched")
    return dataclasses.replace(config, name=f"local-dir:{Path(description).parent}")


def check_model_name(name: str) -> None:
    """Check that timm knows the model.

    Raises:
        ValueError: It does not; the message names the nearest model that it knows.
    """
    if name.startswith(_FROM_ELSEWHERE) or timm.is_model(name):
        return
    near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=1)
    hint = f": did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"model.name must be a model that timm knows, got {name!r}{hint}")


def checkpoint_gradients(model: nn.Module, config: ModelConfig) -> None:
    """Turn on gradient checkpointing: the model recomputes activations in the backward pass.

    Raises:
        ValueError: The model does not support it.
    """
    enable = getattr(model, "set_grad_checkpointing", None)
    if enable is None:
        raise ValueError(
            f"model.grad_checkpointing must be false for model.name {config.name!r}, which does not support it"
        )
    enable()


def check_sizes(model: nn.Module, image_shape: tuple[int, int], config: TrainConfig, device: torch.device) -> None:
    """Check with one image that a model takes images of this size; the random generators keep their states.

    Raises:
        ValueError: The model does not take them.
    """
    image = torch.zeros(1, config.model.in_chans, *image_shape, device=device)
    was_training = model.training
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            model.eval()(image)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        name = f"model.name {config.model.name!r}"
        if image_shape == config.model.image_shape:
            raise ValueError(f"{name} does not take images of model.img_size {image_shape}: {reason}") from error
        raise ValueError(
            f"progressive.start_size must be null for {name}, which does not take images of {image_shape} ({reason}); "
            "a Vision Mamba takes any size with --model.args.dynamic_img_size true, if progressive.multiple is a "
            "multiple of its patch size"
        ) from error
    finally:
        model.train(was_training)


def describe_model(model: nn.Module, config: ModelConfig) -> str:
    """Return the model's name, arguments, number of parameters and origin of weights in one line."""
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    arguments = ", ".join(f"{name}={value}" for name, value in config.args.items())
    start = f", weights of {config.checkpoint}" if config.checkpoint else ", published weights"
    start = start if config.checkpoint or config.pretrained else ""
    return f"{config.name}{f' ({arguments})' if arguments else ''}, {millions:.2f} M parameters{start}"
