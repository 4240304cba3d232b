"""Settings that belong to other tasks."""

from collections.abc import Mapping
from typing import Any

from vim.config.schema import TrainConfig


def refuse_settings(config: TrainConfig, further: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a setting that is on and that neither segmentation nor detection has.

    Args:
        config: The settings of the run.
        further: More settings that the task does not have, by name, with their values.
    """
    augment = config.augment
    off = {
        "augment.mixup": augment.mixup,
        "augment.cutmix": augment.cutmix,
        "augment.erase_prob": augment.erase_prob,
        "augment.auto_augment": augment.auto_augment,
        "augment.color_jitter": augment.color_jitter,
        "progressive.start_size": config.progressive.start_size,
        "distill.teacher": config.distill.teacher,
        **further,
    }
    for name, value in off.items():
        if value:
            raise ValueError(f"{name} must be off for task {config.task!r}, which has no such setting, got {value!r}")
