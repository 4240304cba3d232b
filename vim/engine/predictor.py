"""Classify images with a trained model: what `python -m vim.predict` runs."""

import dataclasses
import json
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo
from timm.data.readers import get_img_extensions
from torch import Tensor, nn

from vim.checkpoints.io import CheckpointError, load_checkpoint, load_into, load_weights
from vim.config.load import config_from_dict, config_to_dict
from vim.config.schema import TrainConfig
from vim.data.preprocessing import Preprocessing
from vim.engine.model import build_model, check_model_name, without_weights
from vim.engine.starting_weights import METADATA_KEY

Weights = Literal["best", "raw", "ema"]

_BATCH_SIZE = 64
# What Pillow raises for a file that is no image, is cut short or would not fit into memory.
_BAD_IMAGE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """The guesses for one image, or why there are none."""

    path: Path
    guesses: tuple[tuple[str, float], ...] = ()
    """Names of the likeliest classes with their probabilities, the likeliest first."""
    error: str | None = None
    """Why the file could not be read."""


class Predictor:
    """A model with its preprocessing and the names of its classes.

    Args:
        model: Gives logits (batch, classes).
        preprocessing: From an image to its input.
        class_names: Name of each class.
        device: Where to run the model.
    """

    def __init__(
        self, model: nn.Module, preprocessing: Preprocessing, class_names: Sequence[str], device: torch.device
    ) -> None:
        self.model = model.eval().to(device)
        self.preprocessing = preprocessing
        self.class_names = tuple(class_names)
        self._device = device
        self._transform = preprocessing.transform()

    @torch.inference_mode()
    def probabilities(self, images: Sequence[Image.Image]) -> Tensor:
        """Classify images.

        Args:
            images: At least one image, of any size and mode.

        Returns:
            Probabilities, (images, classes), float32, on the CPU.
        """
        inputs = torch.stack([self._transform(image) for image in images]).to(self._device)
        return self.model(inputs).float().softmax(dim=1).cpu()

    def predict_files(self, paths: Sequence[Path], topk: int) -> Iterator[Prediction]:
        """Classify image files, in order; a file that cannot be read gives a prediction with an error.

        Args:
            paths: The files.
            topk: How many classes to name for each.

        Raises:
            ValueError: `topk` is less than 1.
        """
        if topk < 1:
            raise ValueError(f"topk must be >= 1, got {topk}")
        for start in range(0, len(paths), _BATCH_SIZE):
            yield from self._predict_batch(paths[start : start + _BATCH_SIZE], min(topk, len(self.class_names)))

    def _predict_batch(self, paths: Sequence[Path], topk: int) -> Iterator[Prediction]:
        images: dict[Path, Image.Image] = {}
        errors: dict[Path, str] = {}
        for path in paths:
            try:
                with Image.open(path) as image:
                    images[path] = image.convert(self.preprocessing.color_mode)
            except _BAD_IMAGE as error:
                errors[path] = " ".join(str(error).split())
        rows: Iterator[Tensor] = iter(self.probabilities(list(images.values())) if images else [])
        for path in paths:
            if path in errors:
                yield Prediction(path=path, error=errors[path])
            else:
                values, labels = next(rows).topk(topk)
                names = [self.class_names[label] for label in labels.tolist()]
                yield Prediction(path=path, guesses=tuple(zip(names, values.tolist(), strict=True)))


def load_predictor(
    source: str, weights: Weights = "best", model_name: str | None = None, device: torch.device | None = None
) -> Predictor:
    """Make a predictor from a run folder, a checkpoint file or the name of a timm model with published weights.

    Args:
        source: The folder, file or name.
        weights: `raw`, `ema` (the averaged ones), or `best`, whichever was better on the held-out images.
        model_name: The timm model that a checkpoint of somebody else belongs to.
        device: Where to run the model; `None` is the CPU.

    Raises:
        ValueError: The source is none of these, or a file does not say which model it belongs to.
        FileNotFoundError: The run folder has no checkpoint yet.
        CheckpointError: The file is damaged, or does not fit the model.
    """
    place = torch.device("cpu") if device is None else device
    path = Path(source)
    if path.is_dir():
        path = path / "best.pth"
    elif not path.exists():
        return _from_published(source, place)
    if model_name is not None:
        return _from_foreign_file(path, model_name, weights, place)
    if path.suffix == ".safetensors":
        return _from_our_weights(path, weights, place)
    return _from_our_checkpoint(path, weights, place)


def weights_metadata(config: TrainConfig, class_names: Sequence[str]) -> dict[str, str]:
    """Return the header of a safetensors file that `load_predictor` can use on its own."""
    return {METADATA_KEY: json.dumps({"config": config_to_dict(config), "class_names": list(class_names)})}


def list_images(path: Path) -> list[Path]:
    """Return the file itself, or every image below a folder in the order of their names.

    Raises:
        FileNotFoundError: There is no such file or folder, or the folder has no images.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"there is no image or folder {path}")
    extensions = get_img_extensions(as_set=True)
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in extensions and file.is_file())
    if not found:
        raise FileNotFoundError(f"there is no image in the folder {path}")
    return found


def _from_config(
    config: TrainConfig, class_names: Sequence[str], state: dict[str, Tensor], path: Path, device: torch.device
) -> Predictor:
    model = build_model(without_weights(config.model), len(class_names))
    load_into(model, state, path)
    return Predictor(model, Preprocessing.from_config(config), describe_classes(class_names), device)


def describe_classes(class_names: Sequence[str]) -> list[str]:
    """Return the names, with words beside them where all are the folders of ImageNet (`n01440764 tench, ...`)."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in class_names):
        return list(class_names)
    descriptions: Any = ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True)
    return [f"{name} {descriptions[name]}" if name in descriptions else name for name in class_names]


def _from_our_checkpoint(path: Path, weights: Weights, device: torch.device) -> Predictor:
    try:
        contents = load_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; if another program wrote it, add --model NAME") from error
    missing = {"config", "class_names", "model", "model_ema", "weights"} - set(contents)
    if missing:
        raise CheckpointError(f"{path} cannot be predicted from: it lacks {min(missing)!r}")
    kind = contents["weights"] if weights == "best" else weights
    state = contents["model_ema" if kind == "ema" else "model"]
    if state is None:
        raise CheckpointError(f"{path} has no averaged weights: the run had ema_decay null")
    return _from_config(config_from_dict(contents["config"], str(path)), contents["class_names"], state, path, device)


def _from_our_weights(path: Path, weights: Weights, device: torch.device) -> Predictor:
    if weights != "best":
        raise ValueError(f"weights must be 'best' for {path}, which holds one set of them, got {weights!r}")
    state, metadata = load_weights(path)
    if METADATA_KEY not in metadata:
        raise CheckpointError(f"{path} does not say which model it belongs to: add --model NAME")
    about = json.loads(metadata[METADATA_KEY])
    return _from_config(config_from_dict(about["config"], str(path)), about["class_names"], state, path, device)


def _from_foreign_file(path: Path, model_name: str, weights: Weights, device: torch.device) -> Predictor:
    check_model_name(model_name)
    model = timm.create_model(model_name)
    try:
        state = timm.models.load_state_dict(str(path), use_ema=weights != "raw")
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} does not load into {model_name!r}: {reason}") from error
    return _from_timm(model, device)


def _from_published(name: str, device: torch.device) -> Predictor:
    if not timm.is_model(name):
        raise ValueError(f"there is no run folder, checkpoint or timm model {name!r}")
    try:
        model: Any = timm.create_model(name, pretrained=True)
    except RuntimeError as error:
        raise ValueError(f"model {name!r} has no weights to predict with: {error}") from error
    return _from_timm(model, device)


def _from_timm(model: Any, device: torch.device) -> Predictor:
    label: Callable[[int], str] = str
    if model.num_classes == 1000:
        label = ImageNetInfo().index_to_description
    names = [label(index) for index in range(model.num_classes)]
    return Predictor(model, Preprocessing.from_model(model), names, device)
