"""Distillation: a teacher's predictions as a part of the loss."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vim.config.schema import TrainConfig
from vim.data.contents import class_changes
from vim.data.preprocessing import Preprocessing
from vim.inference.trained_model import load_trained_model


class Teacher:
    """A frozen trained model that classifies the images that the student sees.

    Loading it leaves the global random generators as they are.

    Args:
        config: The settings of the run.
        class_names: Name of each class of the run.
        device: Where the images are.

    Raises:
        ValueError: There is no such teacher, or it has other classes or channels than the run.
        FileNotFoundError: The run folder of the teacher has no checkpoint.
    """

    def __init__(self, config: TrainConfig, class_names: tuple[str, ...], device: torch.device) -> None:
        distill = config.distill
        assert distill.teacher is not None
        with torch.random.fork_rng(devices=[]):  # building it must not change the weights that the run begins with
            loaded = load_trained_model(distill.teacher, model_name=distill.teacher_model)
        loaded.check_task("classification")
        model: Any = loaded.model
        student, teacher = Preprocessing.from_config(config), loaded.preprocessing
        for what, of_teacher, of_run in (
            ("classes", model.num_classes, len(class_names)),
            ("channels", teacher.in_chans, student.in_chans),
        ):
            if of_teacher != of_run:
                raise ValueError(
                    f"distill.teacher must have as many {what} as the run, {of_run}, got {distill.teacher!r} with "
                    f"{of_teacher}"
                )
        changes = None if loaded.class_names is None else class_changes(loaded.class_names, class_names)
        if changes is not None:
            raise ValueError(
                f"distill.teacher must have the classes of the run in the same order, and from {distill.teacher!r} to "
                f"the run {changes}"
            )
        self._model = model.eval().to(device).requires_grad_(False)
        self._size = teacher.image_shape
        # From the student's normalisation to the teacher's, a channel at a time.
        mean, std, other_mean, other_std = (
            torch.tensor(values, device=device).view(1, -1, 1, 1)
            for values in (student.mean, student.std, teacher.mean, teacher.std)
        )
        self._scale, self._shift = std / other_std, (mean - other_mean) / other_std
        self._hard, self._temperature = distill.mode == "hard", distill.temperature

    @torch.no_grad()
    def answer(self, images: Tensor) -> Tensor:
        """Return the teacher's logits.

        Args:
            images: (batch, in_chans, height, width), normalised for the student, mixed or not.

        Returns:
            (batch, classes).
        """
        inputs = images * self._scale + self._shift
        if inputs.shape[2:] != self._size:
            inputs = F.interpolate(inputs, self._size, mode="bilinear", antialias=True)
        return self._model(inputs)

    def loss(self, logits: Tensor, answer: Tensor) -> Tensor:
        """Return the distance between student and teacher, a mean over the batch.

        Soft: the divergence of the softened probabilities, times the temperature squared, which keeps the size of the
        gradient (Hinton et al. 2015, arXiv:1503.02531, section 2). Hard: cross-entropy with the teacher's first guess
        (Touvron et al. 2021, arXiv:2012.12877, section 3).

        Args:
            logits: The student's, (batch, classes), float32.
            answer: The teacher's, the same shape.
        """
        if self._hard:
            return F.cross_entropy(logits, answer.argmax(dim=1))
        targets = (answer.float() / self._temperature).log_softmax(dim=1)
        guesses = (logits / self._temperature).log_softmax(dim=1)
        return F.kl_div(guesses, targets, reduction="batchmean", log_target=True) * self._temperature**2
