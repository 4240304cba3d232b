"""Exact evaluation of a trained classifier, class by class, behind `python -m vim.validate`."""

import abc
import csv
import dataclasses
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo
from torch import Tensor

from vim.checkpoints.io import write_text
from vim.config.schema import DataConfig, ModelConfig, Precision, TrainConfig
from vim.data.contents import SplitContents, passed_over
from vim.data.loaders import build_eval_loader
from vim.data.preprocessing import Preprocessing
from vim.data.sources import ImageSet, open_eval_set
from vim.data.unreadable import UnreadableLog
from vim.inference.evaluation import EvalResult, evaluate
from vim.inference.plots import draw_confusion
from vim.inference.trained_model import TrainedModel, Weights, load_trained_model
from vim.runtime.agreement import check_agreement, check_weights, data_facts, run_facts
from vim.runtime.device import resolve_device
from vim.runtime.distributed import Processes
from vim.runtime.machine import describe_environment
from vim.runtime.precision import autocast, set_matmul_precision
from vim.runtime.terminal import with_progress

_IMAGENET_CLASSES = 1000


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ValidateOptions:
    """The model and the data of an evaluation; `None` takes the value of the model's run."""

    source: str
    """A run folder, a checkpoint file, or the name of a timm model with published weights."""
    weights: Weights = "best"
    model: str | None = None
    """The timm model of a checkpoint that `vim.train` did not write."""
    dataset: str | None = None
    path: str | None = None
    split: str | None = None
    batch_size: int | None = None
    workers: int | None = None
    precision: Precision = "float32"
    device: str = "auto"
    output: Path | None = None
    """Folder for the files; `None` is `validation` in the run folder, or `validation-NAME` here."""
    crop_pct: float | None = None
    input_key: str | None = None
    target_key: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation(abc.ABC):
    """What the evaluation of a model ends in, whatever its task."""

    class_names: tuple[str, ...]
    unreadable: int
    """Images that could not be read, and are missing from all figures."""
    passed_over: Counter[str]
    """Files of the split that are not images, by their endings."""
    folder: Path
    """The folder of the files."""
    about: dict[str, Any]
    """The model, the data and the environment, as a record that JSON takes."""

    @property
    @abc.abstractmethod
    def count(self) -> int:
        """The number of images that were evaluated."""

    @property
    @abc.abstractmethod
    def headline(self) -> str:
        """The figures in words."""

    @abc.abstractmethod
    def write(self) -> None:
        """Write the tables and pictures and, last, `results.json`.

        Raises:
            OSError: The folder cannot be written.
        """

    def write_record(self, figures: dict[str, Any]) -> None:
        """Write `results.json`: the figures, the counts, and what the evaluation was about."""
        counts = {"count": self.count, "unreadable": self.unreadable}
        write_text(self.folder / "results.json", json.dumps({**figures, **counts, **self.about}, indent=2) + "\n")


def count_unreadable(count: int, log: UnreadableLog, images: int, processes: Processes) -> int:
    """Return the number of images that no process could read.

    Raises:
        RuntimeError: The evaluated images and the unreadable ones are not all images.
    """
    unreadable = sum(processes.gather(log.take()))
    if count + unreadable != images:
        raise RuntimeError(f"evaluation counted {count} images and {unreadable} unreadable of {images}")
    return unreadable


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Validation(Evaluation):
    """The result of an evaluation of a classifier, with its tables."""

    result: EvalResult
    confusion: Tensor
    """Images by their class (rows) and the first guess (columns), (classes, classes), int64, on the CPU."""
    hits_of_five: Tensor
    """Images of each class that have it among the first five guesses, (classes,), int64, on the CPU."""

    @property
    def count(self) -> int:
        """The number of images that were evaluated."""
        return self.result.count

    @property
    def headline(self) -> str:
        """The figures in words."""
        result = self.result
        top5 = "" if result.top5 is None else f"  top-5 {result.top5:.3f} %"
        return f"top-1 {result.top1:.3f} %{top5}  loss {result.loss:.4f}"

    def write(self) -> None:
        """Write `classes.csv`, `confusion.csv`, `confusion.png` and, last, `results.json`, each whole or not at all."""
        folder, names = self.folder, self.class_names
        folder.mkdir(parents=True, exist_ok=True)
        rows = class_table(self)
        write_text(folder / "classes.csv", csv_text([list(rows[0]), *(list(row.values()) for row in rows)]))
        matrix = [[name, *counts] for name, counts in zip(names, self.confusion.tolist(), strict=True)]
        write_text(folder / "confusion.csv", csv_text([["class \\ guess", *names], *matrix]))
        draw_confusion(self.confusion, names, folder / "confusion.png")
        self.write_record(dataclasses.asdict(self.result))


class ConfusionCounter:
    """Counts guesses by class, on the device, over the batches of an evaluation.

    Args:
        num_classes: Number of classes.
        device: Where the batches are.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._num_classes = num_classes
        self._pairs = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
        self._of_five = torch.zeros(num_classes, dtype=torch.int64, device=device)

    def __call__(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits (batch, classes) and labels (batch,)."""
        classes = self._num_classes
        guesses = logits.topk(min(5, classes), dim=1).indices
        self._pairs += torch.bincount(labels * classes + guesses[:, 0], minlength=classes * classes)
        found = labels[(guesses == labels[:, None]).any(dim=1)]
        self._of_five += torch.bincount(found, minlength=classes)

    def totals(self, processes: Processes) -> tuple[Tensor, Tensor]:
        """Return the confusion matrix and the hits among five guesses of all processes, on the CPU."""
        pairs, of_five = processes.sum(self._pairs), processes.sum(self._of_five)
        return pairs.view(self._num_classes, self._num_classes).cpu(), of_five.cpu()


def validate(
    options: ValidateOptions, processes: Processes | None = None, trained: TrainedModel | None = None
) -> Validation:
    """Evaluate a model on every image of a split once.

    Args:
        options: The model and the data.
        processes: The processes that share the images. `None` is this one alone.
        trained: The model that the options name, if it is loaded already.

    Raises:
        Refused: In some process the model or the data cannot be opened, or their classes disagree.
        Disagreement: The processes were started with different settings, data or weights.
    """
    processes = processes or Processes()
    set_matmul_precision(options.precision)
    trained, config, dataset, class_names = processes.together(lambda: _prepare(options, trained))
    device = processes.together(lambda: resolve_device(options.device, processes.local_rank))
    split = options.split or config.data.val_split
    model = trained.model.to(device)
    contents = {split: SplitContents.of(dataset, class_names)}
    asked = [("--split", split), ("--weights", trained.weights), ("--precision", options.precision)]
    check_agreement(processes, chain(asked, run_facts(config), data_facts(class_names, contents)))
    check_weights(processes, model)
    batches, log = build_eval_loader(dataset, config, device, processes.rank, processes.size)
    counter = ConfusionCounter(len(class_names), device)
    shown = with_progress(batches, "evaluating", len(batches), shown=processes.is_main)
    result = evaluate(model, shown, partial(autocast, device.type, options.precision), processes, observe=counter)
    unreadable = count_unreadable(result.count, log, len(dataset), processes)
    confusion, hits_of_five = counter.totals(processes)
    return Validation(
        result=result,
        confusion=confusion,
        hits_of_five=hits_of_five,
        class_names=class_names,
        unreadable=unreadable,
        passed_over=passed_over(dataset),
        folder=choose_folder(options),
        about=describe_evaluation(options, trained, config, device),
    )


def describe_evaluation(
    options: ValidateOptions, trained: TrainedModel, config: TrainConfig, device: torch.device
) -> dict[str, Any]:
    """Return the model, the data and the environment of an evaluation, as a record that JSON takes."""
    return {
        "source": options.source,
        "weights": trained.weights,
        "model": options.model,
        "split": options.split or config.data.val_split,
        "dataset": config.data.dataset,
        "path": config.data.path,
        "precision": options.precision,
        "environment": describe_environment(device),
    }


def _prepare(
    options: ValidateOptions, trained: TrainedModel | None
) -> tuple[TrainedModel, TrainConfig, ImageSet, tuple[str, ...]]:
    """Load the model, and open the images with the labels of its classes."""
    trained = trained or load_trained_model(options.source, options.weights, options.model)
    trained.check_task("classification")
    config = config_for(trained, options)
    return trained, config, *_open(trained, config, options.split or config.data.val_split)


def config_for(trained: TrainedModel, options: ValidateOptions) -> TrainConfig:
    """Return the settings of the model's run, or settings made from its preprocessing, changed by the options."""
    asked: dict[str, Any] = {"dataset": options.dataset, "path": options.path, "workers": options.workers}
    asked |= {"crop_pct": options.crop_pct, "input_key": options.input_key, "target_key": options.target_key}
    changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if options.dataset is not None and options.path is None:
        changes["path"] = None
    if trained.config is not None:
        config = dataclasses.replace(trained.config, data=dataclasses.replace(trained.config.data, **changes))
    else:
        if options.dataset is None and options.path is None:
            raise ValueError(f"--dataset or --path must be given: {options.source} does not name its data")
        config = _config_of_others(trained, {"dataset": "folder", **changes})
    if options.batch_size is not None:
        config = dataclasses.replace(config, eval_batch_size=options.batch_size)
    return config


def _config_of_others(trained: TrainedModel, changes: dict[str, Any]) -> TrainConfig:
    """Return settings for weights that another program trained, from their preprocessing."""
    preprocessing: Preprocessing = trained.preprocessing
    model: Any = trained.model
    data: Any = {
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "crop_pct": preprocessing.crop_pct,
        "interpolation": preprocessing.interpolation,
        **changes,
    }
    shape: Any = {"img_size": preprocessing.image_shape, "in_chans": preprocessing.in_chans}
    return TrainConfig(
        model=ModelConfig(**shape, num_classes=model.num_classes, args={}),
        data=DataConfig(**data),
    )


def _open(trained: TrainedModel, config: TrainConfig, split: str) -> tuple[ImageSet, tuple[str, ...]]:
    """Open the images with the labels of the model's classes."""
    model: Any = trained.model
    if trained.class_names is not None:
        return open_eval_set(config, split, trained.class_names)
    dataset, names = open_eval_set(config, split, None)
    if model.num_classes == _IMAGENET_CLASSES and all(re.fullmatch(r"n\d{8}", name) for name in names):
        # The folders may be some of ImageNet's classes only.
        return open_eval_set(config, split, tuple(ImageNetInfo().label_names()))
    if len(names) != model.num_classes:
        raise ValueError(
            f"data.dataset {config.data.dataset!r} has {len(names)} classes, the model has {model.num_classes}"
        )
    return dataset, names


def choose_folder(options: ValidateOptions) -> Path:
    """Return the folder for the files of an evaluation."""
    if options.output is not None:
        return options.output
    source = Path(options.source)
    if source.is_dir():
        return source / "validation"
    return Path(f"validation-{source.stem if source.exists() else options.source}")


def class_table(validation: Validation) -> list[dict[str, Any]]:
    """Return a row for each class: its images, its guesses, and the shares of right ones in percent.

    A share is `None` if there are no images to divide by.
    """
    confusion = validation.confusion
    right, images, guessed = confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)
    rows = []
    for label, name in enumerate(validation.class_names):
        hits, total, guesses = int(right[label]), int(images[label]), int(guessed[label])
        rows.append(
            {
                "label": label,
                "class": name,
                "images": total,
                "right": hits,
                "guessed": guesses,
                "top1": 100 * hits / total if total else None,
                "top5": 100 * int(validation.hits_of_five[label]) / total if total else None,
                "precision": 100 * hits / guesses if guesses else None,
            }
        )
    return rows


def csv_text(rows: Sequence[Sequence[Any]]) -> str:
    """Return rows as the text of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
