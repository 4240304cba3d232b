"""Exact evaluation of segmentation: every held-out pixel with a class counts once, on any number of processes."""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim.data.masks import NO_CLASS
from vim.data.segmentation import PairBatch
from vim.inference.evaluation import EvaluationStopped
from vim.inference.mask_predictor import MaskPredictor
from vim.runtime.distributed import Processes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MaskResult:
    """The figures of an evaluation."""

    loss: float
    """Mean cross-entropy over the pixels with a class."""
    confusion: Tensor
    """Pixels by their class (rows) and prediction (columns), (classes, classes), int64, on the CPU."""
    count: int
    """Number of images."""

    def figures(self) -> dict[str, float | None]:
        """Return `loss`, `miou`, `macc` and `aacc`, the last three in percent."""
        ious, accuracies = class_figures(self.confusion)
        right, total = int(self.confusion.diagonal().sum()), int(self.confusion.sum())
        return {
            "loss": self.loss,
            "miou": 100 * float(ious.nanmean()),
            "macc": 100 * float(accuracies.nanmean()),
            "aacc": 100 * right / total,
        }


def class_figures(confusion: Tensor) -> tuple[Tensor, Tensor]:
    """Return the intersection over union and the accuracy of each class, (classes,), from 0 to 1.

    The former is NaN for a class that neither masks nor predictions have, the latter for one without pixels.
    """
    right, pixels, predicted = (x.double() for x in (confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)))
    return right / (pixels + predicted - right), right / pixels


def evaluate_masks(
    model: nn.Module,
    predictor: MaskPredictor,
    batches: Iterable[PairBatch],
    num_classes: int,
    processes: Processes | None = None,
    stop_asked: Callable[[], bool] = lambda: False,
    observe: Callable[[Tensor, Tensor, Tensor], None] = lambda image, mask, labels: None,
) -> MaskResult:
    """Predict the labels of every image, and compare them with its mask.

    Args:
        model: The model; it is in evaluation mode during the call.
        predictor: Runs the model.
        batches: The images and masks of this process, and the pairs that could not be read.
        num_classes: Number of classes.
        processes: The processes that share the images; each returns the figures of all. `None` is this one alone.
        stop_asked: Called after every batch; if it returns True in one process, all processes stop.
        observe: Called with the image, the mask and the predicted labels of every image of this process.

    Raises:
        ValueError: There are no pixels with a class.
        EvaluationStopped: A process was asked to stop.
    """
    processes = processes or Processes()
    device = next(model.parameters()).device
    counter = PixelCounter(num_classes, device)
    was_training = model.training
    model.eval()
    for images, masks, _ in batches:
        for image, mask, rows in zip(images, masks, predictor.scores(images), strict=True):
            observe(image, mask, counter.add(rows, mask))
        if stop_asked():
            break
    model.train(was_training)
    stop = processes.sum(torch.tensor([float(stop_asked())], device=device))
    if float(stop):
        raise EvaluationStopped("a process was asked to stop during evaluation")
    confusion = processes.sum(counter.confusion).cpu()
    loss, count = processes.sum(torch.stack([counter.loss, counter.count])).tolist()
    if int(confusion.sum()) == 0:
        raise ValueError("evaluation needs at least one held-out pixel with a class, got none")
    return MaskResult(loss=loss / int(confusion.sum()), confusion=confusion, count=round(count))


class PixelCounter:
    """Counts pixels by class and prediction, and sums their loss, on the device.

    Args:
        num_classes: Number of classes.
        device: Device of the scores.

    Raises:
        ModuleNotFoundError: torchmetrics is not installed.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        if importlib.util.find_spec("torchmetrics") is None:
            raise ModuleNotFoundError(
                'segmentation needs the package torchmetrics: pip install "vimamba[dense]"', name="torchmetrics"
            )
        self._num_classes = num_classes
        exact = torch.float32 if device.type == "mps" else torch.float64
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self.loss = torch.zeros((), dtype=exact, device=device)
        """Sum of the cross-entropy over the pixels with a class."""
        self.count = torch.zeros((), dtype=exact, device=device)
        """Number of images."""

    def add(self, rows: Iterable[tuple[int, Tensor]], mask: Tensor) -> Tensor:
        """Count an image, and return its labels, (height, width), int64, on the CPU.

        Args:
            rows: The first row, and logits (classes, rows, width), from top to bottom.
            mask: (height, width), uint8 labels.
        """
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        found = []
        for top, logits in rows:
            truth = mask[top : top + logits.shape[1]].to(logits.device).long()
            labels = logits.argmax(dim=0)
            self.confusion += multiclass_confusion_matrix(
                labels, truth, self._num_classes, ignore_index=NO_CLASS, validate_args=False
            )
            losses = F.cross_entropy(logits[None], truth[None], ignore_index=NO_CLASS, reduction="none")
            self.loss += losses.to(self.loss.dtype).sum()
            found.append(labels.cpu())
        self.count += 1
        return torch.cat(found)
