"""What detection needs: its packages, and no settings of other tasks."""

import importlib.util

from vim.config.schema import TrainConfig

_PACKAGES = ("torchmetrics", "faster_coco_eval")


def check_packages() -> None:
    """Raise before the run, and not at its first evaluation, if a package of the extra `dense` is not installed.

    Raises:
        ModuleNotFoundError: It is not; the message says how to install it.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"task 'detection' needs {' and '.join(missing)}: pip install \"vimamba[dense]\"")


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
