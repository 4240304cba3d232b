"""Exact evaluation of detectors: COCO's average precision, every held-out image once, on any number of processes."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vim.data.instance_images import EvalBatch
from vim.data.instances import Instances
from vim.inference.evaluation import EvaluationStopped
from vim.runtime.distributed import Processes

Detections = dict[str, Tensor]
_FIGURES = {"ap": "map", "ap50": "map_50", "ap75": "map_75"}
_MASK_THRESHOLD = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DetectionResult:
    """The figures of an evaluation, in percent."""

    figures: dict[str, float | None]
    """`box_ap` (mean over IoU 0.5 to 0.95), `box_ap50`, `box_ap75`, and the same of masks; `None` without masks."""
    count: int
    """Number of images."""


class PrecisionMeter:
    """COCO's average precision of boxes and masks, computed by torchmetrics and faster-coco-eval.

    Args:
        masks: Also compare masks.

    Raises:
        ModuleNotFoundError: One of the two packages is not installed.
    """

    def __init__(self, masks: bool) -> None:
        from torchmetrics.detection import MeanAveragePrecision

        self._kinds = {"box": "bbox"} | ({"mask": "segm"} if masks else {})
        self._metric = MeanAveragePrecision(
            iou_type=tuple(self._kinds.values()),  # type: ignore[arg-type]
            backend="faster_coco_eval",
            # COCO's own, in float64: torchmetrics' are rounded to float32, which moves AP by tenths of a percent.
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0.0, 1.0, 101).tolist(),
            sync_on_compute=False,  # torchmetrics' own exchange of masks needs equally many images in each process
        )
        self._metric.warn_on_many_detections = False
        self.indices: list[int] = []
        """Index of each image in the data set."""

    def add(self, index: int, found: Detections, truth: Instances) -> None:
        """Take an image into account.

        Args:
            index: Index of the image in the data set.
            found: `boxes`, `labels`, `scores`, and `masks` (n, 1, height, width) between 0 and 1.
            truth: The objects in it.
        """
        prediction = {name: found[name].cpu() for name in ("boxes", "labels", "scores")}
        target = {"boxes": truth.boxes, "labels": truth.labels, "iscrowd": truth.crowd.long(), "area": truth.area}
        if "mask" in self._kinds:
            prediction["masks"] = (found["masks"][:, 0] > _MASK_THRESHOLD).cpu()
            target["masks"] = truth.masks
        self._metric.update([prediction], [target])
        self.indices.append(index)

    def figures(self, processes: Processes) -> dict[str, float | None]:
        """Return the figures over the images of all processes, in percent; every process must call it.

        Raises:
            ValueError: The images have no objects.
        """
        own = (self.indices, {name: getattr(self._metric, name) for name in self._metric.metric_state})
        shares = processes.gather(own)
        # In the order of the data set: where scores are equal, the figures depend on it.
        order = sorted(
            (index, rank, place) for rank, (found, _) in enumerate(shares) for place, index in enumerate(found)
        )
        for name in own[1]:
            values = [(shares[rank][1][name], place) for _, rank, place in order]
            setattr(self._metric, name, [state[place] for state, place in values if state])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a process without images has not updated its metric
            computed = self._metric.compute()
        figures: dict[str, float | None] = {}
        for kind in ("box", "mask"):
            prefix = f"{self._kinds[kind]}_" if len(self._kinds) > 1 else ""
            for figure, key in _FIGURES.items():
                value = float(computed[f"{prefix}{key}"]) if kind in self._kinds else None
                figures[f"{kind}_{figure}"] = None if value is None else 100 * value
        if figures["box_ap"] is not None and figures["box_ap"] < 0:
            raise ValueError("evaluation needs at least one held-out object that is not a crowd, got none")
        return figures


@torch.inference_mode()
def evaluate_detections(
    model: nn.Module,
    batches: Iterable[EvalBatch],
    device: torch.device,
    *,
    masks: bool = True,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    processes: Processes | None = None,
    stop_asked: Callable[[], bool] = lambda: False,
    observe: Callable[[Tensor, Instances, Detections], None] = lambda image, truth, found: None,
) -> DetectionResult:
    """Detect the objects in every image, and return COCO's average precision.

    Args:
        model: The detector; it is in evaluation mode during the call.
        batches: The batches of this process.
        device: Device of the model.
        masks: Also compare masks.
        autocast: Returns the context to run the model in.
        processes: The processes that share the images; each returns the figures of all. `None` is this one alone.
        stop_asked: Called after every batch; if it returns True in one process, all processes stop.
        observe: Called with every image of this process, its objects and the detections.

    Raises:
        ValueError: The images have no objects.
        EvaluationStopped: A process was asked to stop.
    """
    was_training = model.training
    model.eval()
    meter = PrecisionMeter(masks)
    for batch in batches:
        if not batch.images:
            continue
        images = [image.to(device).float() / 255 for image in batch.images]
        with autocast():
            found = model(images)
        for index, image, truth, detections in zip(batch.indices, batch.images, batch.truth, found, strict=True):
            meter.add(index, detections, truth)
            observe(image, truth, detections)
        if stop_asked():
            break
    model.train(was_training)
    processes = processes or Processes()
    if any(processes.gather(stop_asked())):
        raise EvaluationStopped("a process was asked to stop during evaluation")
    count = sum(processes.gather(len(meter.indices)))
    return DetectionResult(figures=meter.figures(processes), count=count)
