"""Exact evaluation of a detector, behind `python -m vim.validate`."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from vim.checkpoints.io import write_text
from vim.config.schema import TrainConfig
from vim.data.contents import class_changes
from vim.data.instance_images import EvalBatch
from vim.data.instance_loaders import build_eval_instance_loader, open_instances
from vim.data.instances import Instances, InstanceSource
from vim.data.unreadable import UnreadableLog
from vim.inference.detection_evaluation import DetectionResult, Detections, evaluate_detections
from vim.inference.detection_pictures import Example, draw_examples
from vim.inference.trained_model import TrainedModel
from vim.inference.validation import ValidateOptions, choose_folder, config_for, describe_evaluation
from vim.runtime.agreement import check_agreement, check_weights, run_facts
from vim.runtime.device import resolve_device
from vim.runtime.distributed import Processes
from vim.runtime.precision import autocast, set_matmul_precision
from vim.runtime.terminal import with_progress

_EXAMPLES = 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DetectionValidation:
    """The result of an evaluation."""

    result: DetectionResult
    class_names: tuple[str, ...]
    unreadable: int
    """Images that could not be read, and are missing from all figures."""
    examples: tuple[Example, ...]
    """The first images of this process."""
    folder: Path
    """The folder of the files of `write_detection_validation`."""
    about: dict[str, Any]
    """The model, the data and the environment, as a record that JSON takes."""
    passed_over: Counter[str] = dataclasses.field(default_factory=Counter)
    """Always empty: the annotations name the files."""


def validate_detections(options: ValidateOptions, processes: Processes, trained: TrainedModel) -> DetectionValidation:
    """Evaluate a detector on every image of a split once.

    Args:
        options: The model and the data.
        processes: The processes that share the images.
        trained: The model that the options name.

    Raises:
        Refused: In some process the data cannot be opened.
        Disagreement: The processes were started with different settings, data or weights.
        ValueError: The images have no objects.
    """
    set_matmul_precision(options.precision)
    config, source, class_names = processes.together(lambda: _prepare(options, trained))
    device = processes.together(lambda: resolve_device(options.device, processes.local_rank))
    model = trained.model.eval().to(device)
    asked = [("--split", options.split), ("--weights", trained.weights), ("--precision", options.precision)]
    check_agreement(processes, [*asked, ("the annotations", source.checksum), *run_facts(config)])
    check_weights(processes, model)
    batches = build_eval_instance_loader(source, config, device, processes.rank, processes.size)
    log = UnreadableLog("left out of the evaluation")
    examples: list[Example] = []

    def observe(image: Tensor, truth: Instances, found: Detections) -> None:
        if len(examples) < _EXAMPLES:
            examples.append(Example.of(image, truth, found))

    result = evaluate_detections(
        model,
        _logged(with_progress(batches, "evaluating", len(batches), shown=processes.is_main), log),
        device,
        masks=config.detection.masks,
        autocast=partial(autocast, device.type, options.precision),
        processes=processes,
        observe=observe,
    )
    unreadable = sum(processes.gather(log.take()))
    if result.count + unreadable != len(source):
        raise RuntimeError(f"evaluation counted {result.count} images and {unreadable} unreadable of {len(source)}")
    return DetectionValidation(
        result=result,
        class_names=class_names,
        unreadable=unreadable,
        examples=tuple(examples),
        folder=choose_folder(options),
        about=describe_evaluation(options, trained, config, device),
    )


def _prepare(options: ValidateOptions, trained: TrainedModel) -> tuple[TrainConfig, InstanceSource, tuple[str, ...]]:
    trained.check_task("detection")
    config = config_for(trained, options)
    assert trained.class_names is not None
    source = open_instances(config, options.split or config.data.val_split)
    changes = class_changes(trained.class_names, source.class_names)
    if changes is not None:
        raise ValueError(f"the categories of the data must be the classes of the model: {changes}")
    return config, source, trained.class_names


def _logged(batches: Iterator[Any], log: UnreadableLog) -> Iterator[EvalBatch]:
    """Yield the batches, and log their unreadable images."""
    for batch in batches:
        log.add(batch.unreadable)
        yield batch


def write_detection_validation(validation: DetectionValidation) -> None:
    """Write `predictions.png` and, last, `results.json`.

    Raises:
        OSError: The folder cannot be written.
    """
    folder = validation.folder
    folder.mkdir(parents=True, exist_ok=True)
    if validation.examples:
        draw_examples(validation.examples, validation.class_names, folder / "predictions.png")
    figures = {**validation.result.figures, "count": validation.result.count, "unreadable": validation.unreadable}
    write_text(folder / "results.json", json.dumps(figures | validation.about, indent=2) + "\n")
