"""What detection needs: its packages, and no settings of other tasks."""

import importlib.util

from vim.config.schema import TrainConfig
from vim.tasks.refused_settings import refuse_settings

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
    further = {
        "augment.vflip": augment.vflip,
        "augment.repeats": augment.repeats,
        "loss.label_smoothing": config.loss.label_smoothing,
        "compile": config.compile,
    }
    refuse_settings(config, further)
