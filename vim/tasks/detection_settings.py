"""The settings of other tasks, which detection refuses."""

from vim.config.schema import TrainConfig


def refuse_other_settings(config: TrainConfig) -> None:
    """Raise `ValueError` for settings that detection does not have."""
    augment = config.augment
    off = {
        "augment.mixup": augment.mixup,
        "augment.cutmix": augment.cutmix,
        "augment.erase_prob": augment.erase_prob,
        "augment.auto_augment": augment.auto_augment,
        "augment.color_jitter": augment.color_jitter,
        "augment.vflip": augment.vflip,
        "augment.repeats": augment.repeats,
        "loss.label_smoothing": config.loss.label_smoothing,
        "progressive.start_size": config.progressive.start_size,
        "distill.teacher": config.distill.teacher,
        "compile": config.compile,
    }
    for name, value in off.items():
        if value:
            raise ValueError(f"{name} must be off for task 'detection', which has no such setting, got {value!r}")
