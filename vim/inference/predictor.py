"""Classify images with a trained model; the library side of `python -m vim.predict`."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor, nn

from vim.config.schema import IMAGE_EXTENSIONS
from vim.data.decoding import BAD_IMAGE, describe_bad_image, read_image
from vim.data.listing import list_files
from vim.data.preprocessing import Preprocessing
from vim.inference.trained_model import TrainedModel, Weights, load_trained_model

_BATCH_SIZE = 64


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """The guesses for one image, or the error that prevented them."""

    path: Path
    guesses: tuple[tuple[str, float], ...] = ()
    """Names of the most likely classes with their probabilities, the most likely first."""
    error: str | None = None
    """Reason why the file could not be read."""


class Predictor:
    """A model with its preprocessing and the names of its classes.

    Args:
        model: Maps images to logits, (batch, classes).
        preprocessing: Maps an image to the model's input.
        class_names: Name of each class.
        device: Device of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing,
        class_names: Sequence[str],
        device: torch.device,
    ) -> None:
        self.model = model.eval().to(device)
        self.preprocessing = preprocessing
        self.class_names = tuple(class_names)
        self._device = device
        self._transform = preprocessing.transform()

    def probabilities(self, images: Sequence[Image.Image]) -> Tensor:
        """Classify images.

        Args:
            images: At least one image, of any size and mode.

        Returns:
            Probabilities, (images, classes), float32, on the CPU.
        """
        return self._classify([self._transform(image) for image in images])

    def preprocess(self, image: Image.Image) -> Tensor:
        """Return the input that the model gets of an image, (channels, height, width), on the model's device."""
        return self._transform(image).to(self._device)

    @torch.inference_mode()
    def _classify(self, inputs: Sequence[Tensor]) -> Tensor:
        return self.model(torch.stack(list(inputs)).to(self._device)).float().softmax(dim=1).cpu()

    def predict_files(self, paths: Sequence[Path], topk: int) -> Iterator[Prediction]:
        """Classify image files, in order; a file that cannot be read gives a prediction with an error.

        Args:
            paths: The files.
            topk: Number of classes to return for each file.

        Raises:
            ValueError: `topk` is less than 1.
        """
        if topk < 1:
            raise ValueError(f"topk must be >= 1, got {topk}")
        for start in range(0, len(paths), _BATCH_SIZE):
            yield from self._predict_batch(paths[start : start + _BATCH_SIZE], min(topk, len(self.class_names)))

    def _predict_batch(self, paths: Sequence[Path], topk: int) -> Iterator[Prediction]:
        inputs: dict[Path, Tensor] = {}  # resized at once: 64 whole photographs would take gigabytes
        errors: dict[Path, str] = {}
        for path in paths:
            try:
                inputs[path] = self._transform(read_image(path))
            except BAD_IMAGE as error:
                errors[path] = describe_bad_image(error)
        rows: Iterator[Tensor] = iter(self._classify(list(inputs.values())) if inputs else [])
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
        weights: `raw`, `ema` (the averaged weights) or `best`, see `load_trained_model`.
        model_name: The timm model of a checkpoint that another program wrote.
        device: Device of the model; `None` is the CPU.

    Raises:
        ValueError: The source does not exist, a file does not name its model, or the model does not classify.
        FileNotFoundError: The run folder has no checkpoint yet.
        CheckpointError: The file is damaged, or does not fit the model.
    """
    return make_predictor(load_trained_model(source, weights, model_name), device or torch.device("cpu"))


def make_predictor(trained: TrainedModel, device: torch.device) -> Predictor:
    """Make a predictor from a loaded model.

    Raises:
        ValueError: The model does not classify.
    """
    trained.check_task("classification")
    return Predictor(trained.model, trained.preprocessing, _names_of(trained), device)


def _names_of(trained: TrainedModel) -> list[str]:
    """Return a name for each class: a description if there is one, else its number."""
    if trained.class_names is not None:
        return describe_classes(trained.class_names)
    model: Any = trained.model
    label: Callable[[int], str] = ImageNetInfo().index_to_description if model.num_classes == 1000 else str
    return [label(index) for index in range(model.num_classes)]


def list_images(
    path: Path, extensions: Sequence[str] = IMAGE_EXTENSIONS, passed_over: Counter[str] | None = None
) -> list[Path]:
    """Return the file itself, or the images below a folder in natural order, as training lists them.

    Args:
        path: A file or a folder.
        extensions: Endings of images, in either case.
        passed_over: Counts other files, by kind.

    Raises:
        FileNotFoundError: There is no such file or folder, or the folder has no images.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"there is no image or folder {path}")
    listing = list_files(path, extensions)
    if not listing.paths:
        endings = ", ".join(extensions)
        raise FileNotFoundError(f"there is no image in the folder {path}: none of its files ends in {endings}")
    if passed_over is not None:
        passed_over.update(listing.passed_over)
    return [path / name for name in listing.paths]


def describe_classes(class_names: Sequence[str]) -> list[str]:
    """Return the names, with descriptions if all of them are folders of ImageNet (`n01440764 tench, ...`)."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in class_names):
        return list(class_names)
    descriptions: Any = ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True)
    return [f"{name} {descriptions[name]}" if name in descriptions else name for name in class_names]
