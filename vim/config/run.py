"""Settings for progressive resolution, distillation, checkpoints and logging; part of the schema."""

from dataclasses import dataclass
from typing import Literal

from vim.config.checks import check, check_choice, check_fraction, check_positive

DistillMode = Literal["soft", "hard"]
TrackerName = Literal["tensorboard", "wandb", "mlflow"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgressiveConfig:
    """Progressive resolution: smaller images in the first epochs."""

    start_size: int | None = None
    """Shorter side of the images in the first epoch; `null` turns progressive resolution off."""
    epochs: int | None = None
    """Number of epochs in which the side grows to the full size; `null` is all but the last."""
    multiple: int = 16
    """Smaller sides are multiples of this; use the patch size."""

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
    """Distillation: a loss on the outputs of a teacher, added to the loss on the labels."""

    teacher: str | None = None
    """Run folder, checkpoint file, or timm model with published weights; `null` turns distillation off."""
    teacher_model: str | None = None
    """The timm model of a checkpoint file that another program wrote."""
    mode: DistillMode = "soft"
    """Target: the teacher's probabilities (`soft`) or its top class (`hard`)."""
    weight: float = 0.5
    """Weight of the teacher in the loss; the labels get the rest."""
    temperature: float = 1.0
    """Temperature of both softmaxes in mode `soft`."""

    def __post_init__(self) -> None:
        check_choice("distill.mode", self.mode, DistillMode)
        check_fraction("distill.weight", self.weight)
        check_positive("distill.temperature", self.temperature)
        if self.teacher_model is not None and self.teacher is None:
            raise ValueError(f"distill.teacher must name a checkpoint file of {self.teacher_model!r}, got None")


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveConfig:
    """Checkpoints within an epoch, besides the one after every epoch."""

    steps: int | None = None
    """Write a checkpoint every N optimizer steps; `null` turns this off."""
    minutes: float | None = 10.0
    """Write a checkpoint when the last one is this many minutes old; `null` turns this off."""

    def __post_init__(self) -> None:
        for name in ("steps", "minutes"):
            if getattr(self, name) is not None:
                check_positive(f"save.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What a run shows, besides `summary.csv` and `curves.png`: experiment trackers, and the report at its end."""

    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Any of `tensorboard`, `wandb` and `mlflow`, which must be installed."""
    steps: int = 50
    """Log metrics to the trackers every N optimizer steps, and after every epoch."""
    report: bool = True
    """Write `report.html` at the end, as `python -m vim.report` does; it evaluates the best weights once more."""

    def __post_init__(self) -> None:
        for name in self.trackers:
            check_choice("log.trackers", name, TrackerName)
        check_positive("log.steps", self.steps)
