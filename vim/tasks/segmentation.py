"""Semantic segmentation: images with masks, UPerNet on a Vim, cross-entropy, and mean intersection over union."""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim.config.schema import TrainConfig
from vim.data.contents import SplitContents
from vim.data.masks import NO_CLASS
from vim.data.segmentation_loaders import build_pair_loaders
from vim.inference.mask_evaluation import evaluate_masks
from vim.inference.mask_pictures import Example, draw_examples
from vim.inference.mask_predictor import MaskPredictor
from vim.inference.plots import draw_curves
from vim.models.build_segmenter import build_segmenter
from vim.runtime.distributed import Processes
from vim.runtime.precision import autocast
from vim.tasks.named_classes import NamedClassesTask
from vim.tasks.refused_settings import refuse_settings
from vim.tasks.task import Batch, Evaluation, Figures

_EXAMPLES = 6
_SAMPLES = 10


class SegmentationTask(NamedClassesTask):
    """The task `segmentation`; see `vim.tasks.task.Task` for its methods.

    Args:
        config: The settings of the run.
        device: Where the model and the batches go.
        processes: The processes that share the images.

    Raises:
        ValueError: The data set cannot be used, a setting is for another task, or the processes cannot share a batch.
        ModuleNotFoundError: A package is not installed.
    """

    sums: tuple[str, ...] = ("right", "pixels")
    headline: tuple[str, ...] = ("miou", "loss")

    def __init__(self, config: TrainConfig, device: torch.device, processes: Processes) -> None:
        check_settings(config, device, processes)
        self._device, self._processes = device, processes
        self._autocast = partial(autocast, device.type, config.precision)
        self.loaders = build_pair_loaders(config, device, processes.rank, processes.size)
        names = self.loaders.sets.class_names
        sets = (("training", self.loaders.sets.train), ("held-out", self.loaders.sets.val))
        contents = {
            split: SplitContents(count=len(found.pairs), class_names=list(names), labels=None, keys=found.pairs.keys())
            for split, found in sets
        }
        super().__init__(config, names, contents)
        self._examples: list[Example] = []

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of this process in an epoch."""
        return len(self.loaders.train)

    def build_model(self, starting_weights: bool) -> nn.Module:
        """Build the model with an output for each class, on the CPU."""
        model = build_segmenter(self._config, len(self.class_names), starting_weights)
        if self._processes.size > 1 and self._config.segmentation.norm == "batch":
            return nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return model

    def image_shape(self, epoch: int) -> tuple[int, int]:
        """Return height and width of the crops, the same in every epoch."""
        return self._config.model.image_shape

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """Return the micro-batches of crops of this process in an epoch, without the first ones."""
        self.loaders.order.set_epoch(epoch, first)
        number = self.loaders.order.number
        return (
            Batch(images, masks, (epoch, number(index)))
            for index, (images, masks) in enumerate(self.loaders.train, start=first)
        )

    def training_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the mean loss over the pixels of a micro-batch, and the right pixels and all with a class, (2,).

        As in the original, pixels without a class count in the mean, with a loss of 0. The mean over a batch therefore
        does not depend on how it is split into micro-batches.
        """
        with self._autocast():
            logits, of_aux = model(batch.images)
        loss = self._loss(logits, batch.targets)
        if of_aux is not None:
            loss = loss + self._config.segmentation.aux_weight * self._loss(of_aux, batch.targets)
        with torch.no_grad():
            guesses = _resize(logits.float(), batch.targets).argmax(dim=1)
            counts = torch.stack([(guesses == batch.targets).sum(), (batch.targets != NO_CLASS).sum()])
        return loss, counts.to(loss.dtype)

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(
            _resize(logits.float(), targets),
            targets,
            ignore_index=NO_CLASS,
            reduction="none",
            label_smoothing=self._config.loss.label_smoothing,
        )
        return losses.mean()

    def take_unreadable(self) -> int:
        """Return how many training pairs could not be read since the last call, in this process."""
        return self.loaders.train_unreadable.take()

    def training_figures(self, sums: Mapping[str, float], images: int) -> dict[str, float]:
        """Return the share of right pixels, `aacc`, in percent; NaN before the first step."""
        return {"aacc": 100 * sums["right"] / sums["pixels"] if sums["pixels"] else float("nan")}

    def evaluate(self, model: nn.Module, processes: Processes, stop_asked: Callable[[], bool]) -> Evaluation:
        """Return `loss`, `miou`, `macc` and `aacc` on the held-out images, the last three in percent."""
        predictor = MaskPredictor(model, self._config, self._device, self._autocast)
        examples: list[Example] = []

        def observe(image: Tensor, mask: Tensor, labels: Tensor) -> None:
            if len(examples) < _EXAMPLES:
                examples.append(Example(image, mask, labels))

        result = evaluate_masks(
            model, predictor, self._held_out(), len(self.class_names), processes, stop_asked, observe
        )
        self._examples = examples
        images = len(self.loaders.sets.val)
        unreadable = sum(processes.gather(self.loaders.val_unreadable.take()))
        if result.count + unreadable != images:
            raise RuntimeError(f"evaluation counted {result.count} images and {unreadable} unreadable of {images}")
        return Evaluation(figures=result.figures(), unreadable=unreadable)

    def _held_out(self) -> Iterator[Any]:
        for batch in self.loaders.val:
            self.loaders.val_unreadable.add(batch[2])
            yield batch

    def score(self, figures: Figures) -> tuple[float, ...]:
        """Return a key by which a higher mIoU is better, and at the same mIoU a lower loss."""
        miou, loss = figures["miou"], figures["loss"]
        assert miou is not None
        assert loss is not None
        return miou, -loss

    def describe_data(self) -> list[str]:
        """Return lines with the number of images and the first classes."""
        sets = self.loaders.sets
        passed_over = sets.train.pairs.passed_over + sets.val.pairs.passed_over
        return self._describe_images("images with masks", passed_over)

    def describe_training(self, figures: Figures) -> str:
        """Return the share of right pixels in words."""
        return f"{figures['aacc']:.1f} % of the pixels"

    def describe_epoch(self, row: Mapping[str, Any]) -> str:
        """Return loss and mIoU of an epoch in words."""
        ema = "" if row["ema_miou"] is None else f"  EMA {row['ema_miou']:5.1f}"
        return (
            f"training: loss {row['train_loss']:.3f}, {row['train_aacc']:5.1f} % of the pixels  "
            f"held out: loss {row['val_loss']:.3f}, mIoU {row['val_miou']:5.1f}{ema}"
        )

    def describe_best(self, best: Figures) -> str:
        """Return the best held-out mIoU in words."""
        return f"mIoU {best['miou']:.2f} % on the held-out images"

    def draw_curves(self, history: Sequence[Mapping[str, Any]], path: Path) -> None:
        """Draw loss, mIoU and learning rate of all epochs, and beside it `predictions.png` of the last evaluation."""
        title = f"{self._config.recipe}: {self._config.model.name}"
        draw_curves(history, path, title, "miou", "mean intersection over union, %")
        if self._examples:
            draw_examples(self._examples, len(self.class_names), path.with_name("predictions.png"))

    def write_samples(self, folder: Path) -> None:
        """Write the first held-out images, if they are not files."""
        held_out = self.loaders.sets.val
        if held_out.pairs.keys() is not None:
            return
        folder.mkdir(exist_ok=True)
        for index in range(min(_SAMPLES, len(held_out))):
            held_out.pairs.read(index)[0].save(folder / f"{index:04d}.png")

    def example_image(self) -> Path | None:
        """Return the first held-out image that is a file of its own, or `None`."""
        pairs = self.loaders.sets.val.pairs
        return None if pairs.keys() is None else Path(pairs.name(0))

    def facts(self) -> Iterator[tuple[str, Any]]:
        """Yield the classes and the images of both splits, by name."""
        for label, name in enumerate(self.class_names):
            yield f"the name of class {label}", name
        for split, found in self._contents.items():
            names = "\n".join(found.keys or ()).encode("utf-8", "surrogateescape")
            yield f"the {split} images", f"{found.count} (checksum {zlib.crc32(names):08x})"


def check_settings(config: TrainConfig, device: torch.device, processes: Processes) -> None:
    """Raise `ValueError` for settings that segmentation does not have, or that do not fit the processes."""
    refuse_settings(config, {})
    if config.augment.repeats > 1:
        raise ValueError(
            f"augment.repeats must be 0 for task 'segmentation', got {config.augment.repeats}: see segmentation.repeats"
        )
    if config.segmentation.norm != "batch":
        return
    if processes.size > 1 and device.type != "cuda":
        raise ValueError(
            "segmentation.norm must be 'group' for several processes on a CPU, where PyTorch has no synchronised batch "
            "norm, got 'batch'"
        )
    micro = config.split_batch(processes.size).micro_batch_size
    if micro * processes.size < 2:
        raise ValueError(
            f"micro_batch_size must be >= 2 for segmentation.norm 'batch', which normalises over images, got {micro}: "
            "or set --segmentation.norm group"
        )


def _resize(logits: Tensor, targets: Tensor) -> Tensor:
    """Return logits at the size of the targets."""
    return F.interpolate(logits, targets.shape[-2:], mode="bilinear", align_corners=False)
