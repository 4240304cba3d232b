"""Detection and instance segmentation: images with objects, Mask R-CNN, and COCO's average precision."""

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vim.config.schema import TrainConfig
from vim.data.contents import SplitContents
from vim.data.instance_images import EvalBatch
from vim.data.instance_loaders import build_instance_loaders
from vim.data.instances import Instances
from vim.data.listing import printable
from vim.data.randomness import Draw, seeded
from vim.data.unreadable import UnreadableLog
from vim.inference.detection_evaluation import Detections, evaluate_detections
from vim.inference.detection_pictures import Example, draw_examples
from vim.inference.detectors import build_run_detector
from vim.inference.plots import draw_curves
from vim.runtime.distributed import Processes
from vim.runtime.precision import autocast
from vim.tasks.detection_settings import check_packages, refuse_other_settings
from vim.tasks.named_classes import NamedClassesTask
from vim.tasks.task import Batch, Evaluation, Figures

_EXAMPLES = 6
_SAMPLES = 10
# The part of a detector that a loss of torchvision trains, by the first word of the loss's name.
_PARTS = {
    "loss_objectness": "proposals",
    "loss_rpn": "proposals",
    "loss_classifier": "classes",
    "loss_box": "boxes",
    "loss_mask": "masks",
}


class DetectionTask(NamedClassesTask):
    """The task `detection`; see `vim.tasks.task.Task` for its methods.

    Args:
        config: The settings of the run.
        device: Where the model and the batches go.
        processes: The processes that share the images.

    Raises:
        ValueError: The data set cannot be used, a setting is for another task, or the processes cannot share a batch.
        ModuleNotFoundError: A package is not installed.
    """

    sums: tuple[str, ...] = ("proposals", "classes", "boxes", "masks")

    def __init__(self, config: TrainConfig, device: torch.device, processes: Processes) -> None:
        check_packages()
        refuse_other_settings(config)
        self._device = device
        self._autocast = partial(autocast, device.type, config.precision)
        self.headline: tuple[str, ...] = ("box_ap50", "box_ap", *(["mask_ap"] if config.detection.masks else []))
        self.loaders = build_instance_loaders(config, device, processes.rank, processes.size)
        names = self.loaders.class_names
        self._sources = {
            "training": self.loaders.train_images.source,
            "held-out": self.loaders.val_images.source,
        }
        contents = {
            split: SplitContents(count=len(source), class_names=list(names), labels=None, keys=source.keys())
            for split, source in self._sources.items()
        }
        super().__init__(config, names, contents)
        self._train_unreadable = UnreadableLog("replaced by another image")
        self._val_unreadable = UnreadableLog("left out of the evaluation")
        self._examples: list[Example] = []

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of this process in an epoch."""
        return len(self.loaders.order)

    def build_model(self, starting_weights: bool) -> nn.Module:
        """Build the detector, on the CPU."""
        return build_run_detector(self._config, len(self.class_names), starting_weights)

    def image_shape(self, epoch: int) -> tuple[int, int]:
        """Return height and width of the crops, the same in every epoch."""
        return self._config.model.image_shape

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """Return the micro-batches of this process in an epoch, without the first ones; pixels are from 0 to 1."""
        self.loaders.order.set_epoch(epoch, first)
        for index, batch in enumerate(self.loaders.train, start=first):
            self._train_unreadable.add(batch.unreadable)
            targets = [
                {name: tensor.to(self._device, non_blocking=True) for name, tensor in target.items()}
                for target in batch.targets
            ]
            images = batch.images.to(self._device, non_blocking=True).float() / 255
            yield Batch(images, targets, (epoch, self.loaders.order.number(index)))

    def training_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses of all parts, and the loss of each part times the images, (4,)."""
        # The losses sample anchors and proposals: as a function of the position in the run.
        with seeded(Draw.SAMPLING, self._config.seed, *batch.place, device=self._device), self._autocast():
            losses = model(batch.images, batch.targets)
        parts = dict.fromkeys(self.sums, torch.zeros((), device=self._device))
        for name, loss in losses.items():
            part = next(part for start, part in _PARTS.items() if name.startswith(start))
            parts[part] = parts[part] + loss.float()
        by_part = torch.stack([parts[part] for part in self.sums])
        return by_part.sum(), by_part.detach() * len(batch.images)

    def take_unreadable(self) -> int:
        """Return how many training images could not be read since the last call, in this process."""
        return self._train_unreadable.take()

    def training_figures(self, sums: Mapping[str, float], images: int) -> dict[str, float]:
        """Return the mean loss of each part; NaN before the first step."""
        return {f"{part}_loss": sums[part] / images if images else float("nan") for part in self.sums}

    def evaluate(self, model: nn.Module, processes: Processes, stop_asked: Callable[[], bool]) -> Evaluation:
        """Return COCO's average precision of boxes and masks, in percent; `loss` is `None`: none is computed."""
        examples: list[Example] = []

        def observe(image: Tensor, truth: Instances, found: Detections) -> None:
            if len(examples) < _EXAMPLES:
                examples.append(Example.of(image, truth, found))

        result = evaluate_detections(
            model,
            self._held_out(),
            self._device,
            masks=self._config.detection.masks,
            autocast=self._autocast,
            processes=processes,
            stop_asked=stop_asked,
            observe=observe,
        )
        self._examples = examples
        images, unreadable = len(self.loaders.val_images), sum(processes.gather(self._val_unreadable.take()))
        if result.count + unreadable != images:
            raise RuntimeError(f"evaluation counted {result.count} images and {unreadable} unreadable of {images}")
        return Evaluation(figures={"loss": None, **result.figures}, unreadable=unreadable)

    def _held_out(self) -> Iterator[EvalBatch]:
        for batch in self.loaders.val:
            self._val_unreadable.add(batch.unreadable)
            yield batch

    def score(self, figures: Figures) -> tuple[float, ...]:
        """Return a key by which a higher AP of boxes is better, and at the same AP a higher one of masks."""
        box, mask = figures["box_ap"], figures.get("mask_ap")
        assert box is not None
        return box, 0.0 if mask is None else mask

    def describe_data(self) -> list[str]:
        """Return lines with the number of images, the first classes, and what is unusual about the objects."""
        notes = [
            printable(f"objects  {split}: {', '.join(source.notes)}")
            for split, source in self._sources.items()
            if source.notes
        ]
        return [*self._describe_images("images with objects", Counter()), *notes]

    def describe_training(self, figures: Figures) -> str:
        """Return the losses of the parts in words."""
        return "  ".join(f"{part} {figures[f'{part}_loss']:.2f}" for part in self.sums)

    def describe_epoch(self, row: Mapping[str, Any]) -> str:
        """Return loss and AP of an epoch in words."""
        masks = "" if row["val_mask_ap"] is None else f", masks {row['val_mask_ap']:4.1f}"
        ema = "" if row["ema_box_ap"] is None else f"  EMA {row['ema_box_ap']:4.1f}"
        return (
            f"training: loss {row['train_loss']:.3f}  held out: AP50 {row['val_box_ap50']:4.1f}, "
            f"AP {row['val_box_ap']:4.1f}{masks}{ema}"
        )

    def describe_best(self, best: Figures) -> str:
        """Return the best AP in words."""
        masks = f", mask AP {best['mask_ap']:.2f}" if "mask_ap" in best else ""
        return f"box AP50 {best['box_ap50']:.2f}, box AP {best['box_ap']:.2f}{masks} on the held-out images"

    def draw_curves(self, history: Sequence[Mapping[str, Any]], path: Path) -> None:
        """Draw loss, AP and learning rate of all epochs, and beside it `predictions.png` of the last evaluation."""
        title = f"{self._config.recipe}: {self._config.model.name}"
        draw_curves(history, path, title, "box_ap", "box AP, %")
        if self._examples:
            draw_examples(self._examples, self.class_names, path.with_name("predictions.png"))

    def write_samples(self, folder: Path) -> None:
        """Write the first held-out images, if they are not files."""
        if self.example_image() is not None:
            return
        folder.mkdir(exist_ok=True)
        images = self.loaders.val_images
        for index in range(min(_SAMPLES, len(images))):
            images.read(index)[0].save(folder / f"{index:04d}.png")

    def example_image(self) -> Path | None:
        """Return the first held-out image that is a file of its own, or `None`."""
        path = Path(self._sources["held-out"].name(0))
        return path if path.is_file() else None

    def facts(self) -> Iterator[tuple[str, Any]]:
        """Yield the classes, and the images and annotations of both splits, by name."""
        for label, name in enumerate(self.class_names):
            yield f"the name of class {label}", name
        for split, source in self._sources.items():
            names = "\n".join(source.keys()).encode("utf-8", "surrogateescape")
            yield f"the {split} images", f"{len(source)} (checksum {zlib.crc32(names):08x})"
            yield f"the {split} annotations", f"checksum {source.checksum:08x}"
