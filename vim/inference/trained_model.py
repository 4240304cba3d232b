"""Load a trained model with its preprocessing: from a run folder, a checkpoint file or a registered name."""

import dataclasses
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import timm
from torch import Tensor, nn

from vim.checkpoints.io import CheckpointError, load_checkpoint, load_into, load_weights, refuse_pointer
from vim.config.load import config_from_dict, config_to_dict
from vim.config.schema import IMAGE_EXTENSIONS, TaskName, TrainConfig
from vim.data.preprocessing import Preprocessing
from vim.inference.detectors import build_run_detector
from vim.models import VisionMamba
from vim.models.build import build_model, check_model_name, without_download, without_weights
from vim.models.build_segmenter import build_segmenter
from vim.models.pretrained import checkpoint_filter_fn, read_checkpoint, select_weights
from vim.models.starting_weights import METADATA_KEY

Weights = Literal["best", "raw", "ema"]

# Exceptions caused by malformed contents in a file whose checksums are right.
_MALFORMED = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    OSError,
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainedModel:
    """A model with its preprocessing, classes and settings."""

    model: nn.Module
    """Maps images to logits: (batch, classes), or of a segmentation (batch, classes, height, width). A detector
    maps them to a dictionary each, as torchvision's do. On the CPU."""
    preprocessing: Preprocessing
    """Maps an image to the model's input."""
    class_names: tuple[str, ...] | None
    """Name of each class; `None` if the file does not name them."""
    config: TrainConfig | None
    """The settings of the run; `None` for weights of another program."""
    weights: Weights
    """Kind of the weights: `raw`, `ema`, or `best` if the file holds one set."""
    path: Path | None
    """The file; `None` for published weights."""

    @property
    def task(self) -> TaskName:
        """The task that the model was trained for."""
        return "classification" if self.config is None else self.config.task

    @property
    def extensions(self) -> tuple[str, ...]:
        """Endings of the images that the model was trained on."""
        return IMAGE_EXTENSIONS if self.config is None else self.config.data.extensions

    def check_task(self, task: TaskName) -> None:
        """Raise `ValueError` unless the model was trained for a task."""
        if self.task != task:
            raise ValueError(f"the model must be of task {task!r}, and {self.path} is of task {self.task!r}")


def load_trained_model(source: str, weights: Weights = "best", model_name: str | None = None) -> TrainedModel:
    """Load a model with its weights.

    Args:
        source: A run folder, a checkpoint file, or the name of a timm model with published weights.
        weights: `raw`, `ema` (the averaged weights) or `best`. In a run of this library `best` is the better of both on
            held-out images; in other files it is `raw`.
        model_name: The timm model of a checkpoint that another program wrote.

    Raises:
        ValueError: The source does not exist, or a file does not name its model.
        FileNotFoundError: The run folder has no checkpoint yet.
        CheckpointError: The file is damaged, or does not fit the model.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "best.pth"
    elif not path.exists():
        return _published(source, weights)
    refuse_pointer(path)
    if model_name is not None:
        return _foreign_file(path, model_name, weights)
    if path.suffix == ".safetensors":
        return _our_weights(path, weights)
    return _our_checkpoint(path, weights)


def weights_metadata(config: TrainConfig, class_names: Sequence[str]) -> dict[str, str]:
    """Return the metadata with which `load_trained_model` can load a safetensors file."""
    return {METADATA_KEY: json.dumps({"config": config_to_dict(config), "class_names": list(class_names)})}


def _ours(about: Any, state: Any, path: Path, weights: Weights) -> TrainedModel:
    """Build the model of one of our runs from its settings and class names in `about`.

    The file cannot trigger a download: only a command line may ask for one, with `--model NAME`.
    """
    try:
        config = config_from_dict(about["config"], str(path))
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, download=False))
        class_names = _texts(about["class_names"])
        model = _build(config, len(class_names))
        load_into(model, _tensors(state), path)
    except CheckpointError:
        raise
    except _MALFORMED as error:
        reason = f"{type(error).__name__}: " if isinstance(error, LookupError) else ""
        raise CheckpointError(f"{path} cannot be used: {reason}{' '.join(str(error).split())}") from error
    return TrainedModel(
        model=model,
        preprocessing=Preprocessing.from_config(config),
        class_names=class_names,
        config=config,
        weights=weights,
        path=path,
    )


def _build(config: TrainConfig, num_classes: int) -> nn.Module:
    """Build the model of a run without weights, and without a download."""
    own = without_download(without_weights(config.model))
    if config.task == "segmentation":
        return build_segmenter(dataclasses.replace(config, model=own), num_classes)
    if config.task == "detection":
        return build_run_detector(dataclasses.replace(config, model=own), num_classes)
    return build_model(own, num_classes)


def _texts(names: Any) -> tuple[str, ...]:
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError("class_names must be a list of at least one text")
    return tuple(names)


def _tensors(state: Any) -> dict[str, Tensor]:
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError("its weights must be tensors by name")
    return dict(state)


def _our_checkpoint(path: Path, weights: Weights) -> TrainedModel:
    try:
        contents = load_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; if another program wrote it, add --model NAME") from error
    missing = {"config", "class_names", "model", "model_ema", "weights"} - set(contents)
    if missing:
        raise CheckpointError(f"{path} cannot be predicted from: it lacks {min(missing)!r}")
    kind = contents["weights"] if weights == "best" else weights
    if kind not in ("raw", "ema"):
        raise CheckpointError(f"{path} cannot be predicted from: its weights must be 'raw' or 'ema', got {kind!r}")
    state = contents["model_ema" if kind == "ema" else "model"]
    if state is None:
        raise CheckpointError(f"{path} has no averaged weights: the run had ema_decay null")
    return _ours(contents, state, path, kind)


def _our_weights(path: Path, weights: Weights) -> TrainedModel:
    if weights != "best":
        raise ValueError(f"weights must be 'best' for {path}, which holds one set of them, got {weights!r}")
    state, metadata = load_weights(path)
    if METADATA_KEY not in metadata:
        raise CheckpointError(f"{path} does not say which model it belongs to: add --model NAME")
    try:
        about = json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be used: its settings are not JSON ({error})") from error
    return _ours(about, state, path, weights)


def _foreign_file(path: Path, model_name: str, weights: Weights) -> TrainedModel:
    check_model_name(model_name)
    kind: Literal["raw", "ema"] = "ema" if weights == "ema" else "raw"
    model: Any = timm.create_model(model_name)
    try:
        if isinstance(model, VisionMamba):
            state = select_weights(read_checkpoint(path), kind)
            model = _with_classes_of(state, model, model_name)
            state = checkpoint_filter_fn(state, model)
        else:
            state = timm.models.load_state_dict(str(path), use_ema=kind == "ema")
        model.load_state_dict(state)
    except (RuntimeError, ValueError, AttributeError, TypeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} does not load into {model_name!r}: {reason}") from error
    return _of_timm(model, "best" if path.suffix == ".safetensors" else kind, path)


def _with_classes_of(state: dict[str, Tensor], model: VisionMamba, model_name: str) -> Any:
    """Return the model, built again if the state dict has another number of classes."""
    head = state.get("head.weight")
    if head is None or head.ndim != 2 or head.shape[0] == model.num_classes:
        return model
    return timm.create_model(model_name, num_classes=head.shape[0])


def _published(name: str, weights: Weights) -> TrainedModel:
    if not timm.is_model(name):
        raise ValueError(f"there is no run folder, checkpoint or timm model {name!r}")
    average: dict[str, Any] = {"pretrained_weights": "ema"} if weights == "ema" else {}
    try:
        model: Any = timm.create_model(name, pretrained=True, **average)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"model {name!r} has no weights to predict with: {error}") from error
    return _of_timm(model, "ema" if average else "raw", None)


def _of_timm(model: Any, weights: Weights, path: Path | None) -> TrainedModel:
    return TrainedModel(
        model=model,
        preprocessing=Preprocessing.from_model(model),
        class_names=None,
        config=None,
        weights=weights,
        path=path,
    )
