"""Image classification: labelled images, a model with a head, cross-entropy and accuracy."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vim.config.schema import TrainConfig
from vim.data.contents import contents_of, passed_over
from vim.data.loaders import build_loaders
from vim.data.sources import first_readable_file
from vim.data.tensors import TensorImages
from vim.inference.evaluation import evaluate
from vim.inference.plots import draw_curves
from vim.models.build import build_model, without_weights
from vim.runtime.agreement import data_facts
from vim.runtime.distributed import Processes
from vim.runtime.precision import autocast
from vim.tasks.classification_loss import ClassificationLoss
from vim.tasks.named_classes import NamedClassesTask
from vim.tasks.samples import write_samples
from vim.tasks.task import Batch, Evaluation, Figures


class ClassificationTask(NamedClassesTask):
    """The task `classification`; see `vim.tasks.task.Task` for its methods.

    Args:
        config: The settings of the run.
        device: Where the model and the batches go.
        processes: The processes that share the images.

    Raises:
        ValueError: The data set or the teacher cannot be used, or the processes cannot share a batch evenly.
        ModuleNotFoundError: The data set needs a package that is not installed.
    """

    sums: tuple[str, ...] = ("hits",)
    headline: tuple[str, ...] = ("top1", "loss")

    def __init__(self, config: TrainConfig, device: torch.device, processes: Processes) -> None:
        self._autocast = partial(autocast, device.type, config.precision)
        self.loaders = build_loaders(config, device, processes.rank, processes.size)
        super().__init__(config, self.loaders.class_names, contents_of(self.loaders.sets))
        self._loss = ClassificationLoss(config, self.class_names, device)

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of this process in an epoch."""
        return len(self.loaders.train)

    def build_model(self, starting_weights: bool) -> nn.Module:
        """Build the model with an output for each class, on the CPU."""
        config = self._config.model
        return build_model(
            config if starting_weights else without_weights(config), len(self.class_names), self.class_names
        )

    def image_shape(self, epoch: int) -> tuple[int, int]:
        """Return height and width of the training images in an epoch, counted from 0."""
        return self._loss.image_shape(epoch)

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """Return the labelled micro-batches of this process in an epoch, without the first ones."""
        self.loaders.set_epoch(epoch, first)
        number = self.loaders.order.number
        return (
            Batch(images, labels, (epoch, number(index)))
            for index, (images, labels) in enumerate(self.loaders.train, start=first)
        )

    def training_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a micro-batch, and the number of right first guesses, (1,)."""
        loss, hits = self._loss(model, batch.images, batch.targets, batch.place)
        return loss, hits.to(loss.dtype)[None]

    def take_unreadable(self) -> int:
        """Return how many training images could not be read since the last call, in this process."""
        return self.loaders.train_unreadable.take()

    def training_figures(self, sums: Mapping[str, float], images: int) -> dict[str, float]:
        """Return the training accuracy, `top1`, in percent; NaN before the first step."""
        return {"top1": 100 * sums["hits"] / images if images else float("nan")}

    def evaluate(self, model: nn.Module, processes: Processes, stop_asked: Callable[[], bool]) -> Evaluation:
        """Return `loss`, `top1` and `top5` on the held-out images; `top5` is `None` with five classes or less."""
        result = evaluate(model, self.loaders.val, self._autocast, processes, stop_asked)
        images = len(self.loaders.sets.val)
        unreadable = sum(processes.gather(self.loaders.val_unreadable.take()))
        if result.count + unreadable != images:
            raise RuntimeError(f"evaluation counted {result.count} images and {unreadable} unreadable of {images}")
        figures = {"loss": result.loss, "top1": result.top1, "top5": result.top5}
        return Evaluation(figures=figures, unreadable=unreadable)

    def score(self, figures: Figures) -> tuple[float, ...]:
        """Return a key by which a higher accuracy is better, and at the same accuracy a lower loss."""
        top1, loss = figures["top1"], figures["loss"]
        assert top1 is not None
        assert loss is not None
        return top1, -loss

    def describe_data(self) -> list[str]:
        """Return lines with the number of images and the first classes."""
        sets = self.loaders.sets
        return self._describe_images("images", passed_over(sets.train, sets.val))

    def describe_training(self, figures: Figures) -> str:
        """Return the training accuracy in words."""
        return f"accuracy {figures['top1']:.1f} %"

    def describe_epoch(self, row: Mapping[str, Any]) -> str:
        """Return loss and accuracy of an epoch, training and held out, in words."""
        ema = "" if row["ema_top1"] is None else f"  EMA {row['ema_top1']:5.1f} %"
        return (
            f"training: loss {row['train_loss']:.3f}, {row['train_top1']:5.1f} %  "
            f"held out: loss {row['val_loss']:.3f}, {row['val_top1']:5.1f} %{ema}"
        )

    def describe_best(self, best: Figures) -> str:
        """Return the best held-out accuracy in words."""
        return f"{best['top1']:.2f} % of the held-out images right"

    def draw_curves(self, history: Sequence[Mapping[str, Any]], path: Path) -> None:
        """Draw loss, accuracy and learning rate of all epochs into a PNG file."""
        draw_curves(history, path, f"{self._config.recipe}: {self._config.model.name}")

    def write_samples(self, folder: Path) -> None:
        """Write an image of each class, if the held-out images are in memory."""
        held_out = self.loaders.sets.val
        if isinstance(held_out, TensorImages):
            write_samples(folder, held_out, self.class_names)

    def example_image(self) -> Path | None:
        """Return a held-out image that is a file of its own, or `None`."""
        return first_readable_file(self.loaders.sets.val)

    def facts(self) -> Iterator[tuple[str, Any]]:
        """Yield the classes and the images of both splits, by name."""
        return data_facts(self.class_names, self._contents)
