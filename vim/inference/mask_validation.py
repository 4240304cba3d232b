"""Exact evaluation of a segmentation model, class by class, behind `python -m vim.validate`."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from vim.checkpoints.io import write_text
from vim.config.schema import TrainConfig
from vim.data.mask_pairs import InstancePairs
from vim.data.segmentation import PairSet, open_eval_pairs
from vim.data.segmentation_loaders import build_eval_pair_loader
from vim.data.unreadable import UnreadableLog
from vim.inference.instance_matching import InstanceMatches, match_instances
from vim.inference.mask_evaluation import MaskResult, class_figures, evaluate_masks
from vim.inference.mask_pictures import Example, draw_examples
from vim.inference.mask_predictor import MaskPredictor
from vim.inference.plots import draw_confusion
from vim.inference.trained_model import TrainedModel
from vim.inference.validation import (
    Evaluation,
    ValidateOptions,
    choose_folder,
    config_for,
    count_unreadable,
    csv_text,
    describe_evaluation,
)
from vim.runtime.agreement import check_agreement, check_weights, run_facts
from vim.runtime.device import resolve_device
from vim.runtime.distributed import Processes
from vim.runtime.precision import autocast, set_matmul_precision
from vim.runtime.terminal import with_progress

_EXAMPLES = 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MaskValidation(Evaluation):
    """The result of an evaluation of a segmentation model, with its tables."""

    result: MaskResult
    instances: InstanceMatches | None
    """The connected parts of the foreground and the true objects; `None` if the data set has none."""
    examples: tuple[Example, ...]
    """The first images of this process."""

    @property
    def count(self) -> int:
        """The number of images that were evaluated."""
        return self.result.count

    @property
    def headline(self) -> str:
        """The figures in words."""
        figures, instances = self.result.figures(), self.instances
        objects = "" if instances is None else f"  instance AP50 {instances.ap50:.3f} %"
        return (
            f"mIoU {figures['miou']:.3f} %  mAcc {figures['macc']:.3f} %  aAcc {figures['aacc']:.3f} %  "
            f"loss {figures['loss']:.4f}{objects}"
        )

    def write(self) -> None:
        """Write `classes.csv`, `confusion.csv`, `confusion.png`, `predictions.png` and, last, `results.json`."""
        folder, names = self.folder, self.class_names
        folder.mkdir(parents=True, exist_ok=True)
        rows = mask_table(self)
        write_text(folder / "classes.csv", csv_text([list(rows[0]), *(list(row.values()) for row in rows)]))
        confusion = self.result.confusion
        matrix = [[name, *counts] for name, counts in zip(names, confusion.tolist(), strict=True)]
        write_text(folder / "confusion.csv", csv_text([["class \\ prediction", *names], *matrix]))
        draw_confusion(confusion, names, folder / "confusion.png")
        if self.examples:
            draw_examples(self.examples, len(names), folder / "predictions.png")
        instances = self.instances
        objects = {} if instances is None else {"instance_ap50": instances.ap50, **dataclasses.asdict(instances)}
        self.write_record(self.result.figures() | objects)


def validate_masks(options: ValidateOptions, processes: Processes, trained: TrainedModel) -> MaskValidation:
    """Evaluate a segmentation model on every image of a split once.

    Args:
        options: The model and the data.
        processes: The processes that share the images.
        trained: The model that the options name.

    Raises:
        Refused: In some process the data cannot be opened.
        Disagreement: The processes were started with different settings, data or weights.
    """
    set_matmul_precision(options.precision)
    config, pairs, class_names = processes.together(lambda: _prepare(options, trained))
    device = processes.together(lambda: resolve_device(options.device, processes.local_rank))
    model = trained.model.eval().to(device)
    asked = [("--split", options.split), ("--weights", trained.weights), ("--precision", options.precision)]
    check_agreement(processes, [*asked, ("the number of images", len(pairs)), *run_facts(config)])
    check_weights(processes, model)
    batches, log = build_eval_pair_loader(pairs, config, device, processes.rank, processes.size)
    examples: list[Example] = []

    def observe(image: Tensor, mask: Tensor, labels: Tensor) -> None:
        if len(examples) < _EXAMPLES:
            examples.append(Example(image, mask, labels))

    predictor = MaskPredictor(model, config, device, partial(autocast, device.type, options.precision))
    result = evaluate_masks(
        model,
        predictor,
        _logged(with_progress(batches, "evaluating", len(batches), shown=processes.is_main), log),
        len(class_names),
        processes,
        observe=observe,
    )
    return MaskValidation(
        result=result,
        instances=_match_instances(pairs, predictor),
        class_names=class_names,
        unreadable=count_unreadable(result.count, log, len(pairs), processes),
        passed_over=pairs.pairs.passed_over,
        examples=tuple(examples),
        folder=choose_folder(options),
        about=describe_evaluation(options, trained, config, device),
    )


def _match_instances(pairs: PairSet, predictor: MaskPredictor) -> InstanceMatches | None:
    """Compare the connected parts of the predicted foreground with the true objects, if the data set has them."""
    source = pairs.pairs
    if not isinstance(source, InstancePairs):
        return None
    return match_instances(
        (predictor.labels(pairs.read(index)[0]).numpy(), source.instances(index)) for index in range(len(source))
    )


def _prepare(options: ValidateOptions, trained: TrainedModel) -> tuple[TrainConfig, PairSet, tuple[str, ...]]:
    trained.check_task("segmentation")
    config = config_for(trained, options)
    assert trained.class_names is not None
    return (
        config,
        open_eval_pairs(config, options.split or config.data.val_split, trained.class_names),
        (trained.class_names),
    )


def _logged(batches: Iterator[Any], log: UnreadableLog) -> Iterator[Any]:
    """Yield the batches, and log their unreadable pairs."""
    for batch in batches:
        log.add(batch[2])
        yield batch


def mask_table(validation: MaskValidation) -> list[dict[str, Any]]:
    """Return a row for each class: its pixels, the predicted ones, and its figures in percent, `None` if undefined."""
    confusion = validation.result.confusion
    ious, accuracies = class_figures(confusion)
    pixels, predicted = confusion.sum(dim=1), confusion.sum(dim=0)
    return [
        {
            "label": label,
            "class": name,
            "pixels": int(pixels[label]),
            "predicted": int(predicted[label]),
            "iou": _percent(ious[label]),
            "accuracy": _percent(accuracies[label]),
        }
        for label, name in enumerate(validation.class_names)
    ]


def _percent(share: Tensor) -> float | None:
    return None if bool(share.isnan()) else 100 * float(share)
