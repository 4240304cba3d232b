"""Exact evaluation of a detector, behind `python -m vim.validate`."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from vim.config.schema import TrainConfig
from vim.data.contents import class_changes
from vim.data.instance_images import EvalBatch
from vim.data.instance_loaders import build_eval_instance_loader, open_instances
from vim.data.instances import Instances, InstanceSource
from vim.data.unreadable import UnreadableLog
from vim.inference.detection_evaluation import DetectionResult, Detections, evaluate_detections
from vim.inference.detection_pictures import Example, draw_examples
from vim.inference.trained_model import TrainedModel
from vim.inference.validation import (
    Evaluation,
    ValidateOptions,
    choose_folder,
    config_for,
    count_unreadable,
    describe_evaluation,
)
from vim.runtime.agreement import check_agreement, check_weights, run_facts
from vim.runtime.device import resolve_device
from vim.runtime.distributed import Processes
from vim.runtime.precision import autocast, set_matmul_precision
from vim.runtime.terminal import with_progress

_EXAMPLES = 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DetectionValidation(Evaluation):
    """The result of an evaluation of a detector; `passed_over` is empty, since the annotations name the files."""

    result: DetectionResult
    examples: tuple[Example, ...]
    """The first images of this process."""

    @property
    def count(self) -> int:
        """The number of images that were evaluated."""
        return self.result.count

    @property
    def headline(self) -> str:
        """The figures in words."""
        return "  ".join(
            f"{name.replace('_', ' ').replace('ap', 'AP')} {value:.3f} %"
            for name, value in self.result.figures.items()
            if value is not None
        )

    def write(self) -> None:
        """Write `predictions.png` and, last, `results.json`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.examples:
            draw_examples(self.examples, self.class_names, self.folder / "predictions.png")
        self.write_record(self.result.figures)


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
    return DetectionValidation(
        result=result,
        class_names=class_names,
        unreadable=count_unreadable(result.count, log, len(source), processes),
        passed_over=Counter(),
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
