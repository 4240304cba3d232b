"""Settings of saving, logging, progressive resolution and distillation; a part of the schema."""

from dataclasses import dataclass
from typing import Literal

from vim.config.checks import check, check_choice, check_fraction, check_positive

DistillMode = Literal["soft", "hard"]
TrackerName = Literal["tensorboard", "wandb", "mlflow"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgressiveConfig:
    """Progressive resolution: smaller images in the first epochs."""

    start_size: int | None = None
    """Shorter side of the images in the first epoch; `null` shows them in full size from the start."""
    epochs: int | None = None
    """Epochs in which the side grows to the full size, which those after them have; `null` is all but the last."""
    multiple: int = 16
    """Sides on the way are multiples of this; take the patch size."""

    def __post_init__(self) -> None:
        for name in ("start_size", "epochs"):
            if getattr(self, name) is not None:
                check_positive(f"progressive.{name}", getattr(self, name))
        check_positive("progressive.multiple", self.multiple)
        if self.start_size is not None:
            rule = f"a multiple of progressive.multiple = {self.multiple}"
            check("progressive.start_size", self.start_size, rule, lambda v: v % self.multiple == 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """Distillation: learning from the answers of a teacher, besides the labels."""

    teacher: str | None = None
    """Run folder, checkpoint file, or name of a timm model with published weights; `null` is no teacher."""
    teacher_model: str | None = None
    """The timm model that the checkpoint file of somebody else belongs to."""
    mode: DistillMode = "soft"
    """Follow the teacher's probabilities (`soft`) or its first guess (`hard`)."""
    weight: float = 0.5
    """Share of the teacher in the loss; the labels have the rest."""
    temperature: float = 1.0
    """Temperature of both softmaxes, in the mode `soft`."""

    def __post_init__(self) -> None:
        check_choice("distill.mode", self.mode, DistillMode)
        check_fraction("distill.weight", self.weight)
        check_positive("distill.temperature", self.temperature)
        if self.teacher_model is not None and self.teacher is None:
            raise ValueError(f"distill.teacher must name a checkpoint file of {self.teacher_model!r}, got None")


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveConfig:
    """Checkpoints within an epoch; one is written after every epoch in any case."""

    steps: int | None = None
    """Write one every so many optimizer steps; `null` counts none."""
    minutes: float | None = 10.0
    """Write one when the last is so many minutes old; `null` looks at no clock."""

    def __post_init__(self) -> None:
        for name in ("steps", "minutes"):
            if getattr(self, name) is not None:
                check_positive(f"save.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """Figures for programs that draw them; `summary.csv` and `curves.png` are written in any case."""

    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Any of `tensorboard`, `wandb` and `mlflow`, which must be installed."""
    steps: int = 50
    """Hand them figures every so many optimizer steps, besides those of every epoch."""

    def __post_init__(self) -> None:
        for name in self.trackers:
            check_choice("log.trackers", name, TrackerName)
        check_positive("log.steps", self.steps)
