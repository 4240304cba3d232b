"""The loss of classification: mixing, image size, forward pass, cross-entropy and teacher."""

from functools import partial

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from vim.config.schema import TrainConfig
from vim.data.randomness import Draw, seeded
from vim.runtime.precision import autocast
from vim.tasks.distillation import Teacher


class ClassificationLoss:
    """The training loss of a batch, computed as the settings say.

    Args:
        config: The settings of the run.
        class_names: Name of each class.
        device: Where the model is.

    Raises:
        ValueError: The teacher cannot teach this run.
    """

    def __init__(self, config: TrainConfig, class_names: tuple[str, ...], device: torch.device) -> None:
        self._seed = config.seed
        self._autocast = partial(autocast, device.type, config.precision)
        augment, smoothing = config.augment, config.loss.label_smoothing
        self._mix = (
            Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mix_prob,
                switch_prob=augment.mix_switch_prob,
                mode=augment.mix_mode,
                label_smoothing=smoothing,
                num_classes=len(class_names),
            )
            if augment.mixes
            else None
        )
        self._criterion: nn.Module
        if self._mix is not None:
            self._criterion = SoftTargetCrossEntropy()  # the mixed targets are smoothed already
        elif smoothing > 0:
            self._criterion = LabelSmoothingCrossEntropy(smoothing)
        else:
            self._criterion = nn.CrossEntropyLoss()

        self._image_shape, self._progressive = config.model.image_shape, config.progressive
        self._growing = config.progressive.epochs or max(1, config.epochs - 1)
        self._teacher = Teacher(config, class_names, device) if config.distill.teacher is not None else None
        self._teacher_weight = config.distill.weight

    def image_shape(self, epoch: int) -> tuple[int, int]:
        """Return height and width of the images that the model is trained on in an epoch, counted from 0."""
        start, full = self._progressive.start_size, min(self._image_shape)
        if start is None or epoch >= self._growing:
            return self._image_shape
        side = start + (full - start) * epoch / self._growing
        multiple = self._progressive.multiple
        height, width = (
            max(multiple, round(length * side / full / multiple) * multiple) for length in self._image_shape
        )
        return min(height, self._image_shape[0]), min(width, self._image_shape[1])

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, place: tuple[int, int] = (0, 0)
    ) -> tuple[Tensor, Tensor]:
        """Run the model on a batch of training images.

        Args:
            model: The model to train.
            images: (batch, in_chans, height, width), normalised; mixing changes them in place.
            labels: (batch,), int64.
            place: Epoch, and number of the batch in it over all processes; with the seed it decides how to mix.

        Returns:
            The mean loss, float32, and the number of images whose first guess is the class of the target. For a mixed
            image that is the class with the larger share. Both are scalars on the device.
        """
        targets = labels
        if self._mix is not None:
            with seeded(Draw.MIXING, self._seed, *place):
                images, targets = self._mix(images, labels)  # (batch, num_classes)
        shape = self.image_shape(place[0])
        with self._autocast():
            answer = self._teacher.answer(images) if self._teacher is not None else None
            if shape != self._image_shape:
                images = F.interpolate(images, shape, mode="bilinear", antialias=True)
            logits = model(images)
        logits = logits.float()
        loss = self._criterion(logits, targets)
        if self._teacher is not None and answer is not None:
            loss = torch.lerp(loss, self._teacher.loss(logits, answer), self._teacher_weight)
        top = targets if targets.ndim == 1 else targets.argmax(dim=1)
        return loss, (logits.argmax(dim=1) == top).sum()
