"""The tasks by name, as in the setting `task`."""

from collections.abc import Callable

import torch

from vim.config.schema import TaskName, TrainConfig
from vim.runtime.distributed import Processes
from vim.tasks.classification import ClassificationTask
from vim.tasks.detection import DetectionTask
from vim.tasks.segmentation import SegmentationTask
from vim.tasks.task import Task

TASKS: dict[TaskName, Callable[[TrainConfig, torch.device, Processes], Task]] = {
    "classification": ClassificationTask,
    "segmentation": SegmentationTask,
    "detection": DetectionTask,
}


def open_task(config: TrainConfig, device: torch.device, processes: Processes) -> Task:
    """Open the task that the settings name, with its data.

    Args:
        config: The settings of the run.
        device: Where the model and the batches go.
        processes: The processes that share the images.

    Raises:
        ValueError: A setting does not fit the data or the number of processes.
        ModuleNotFoundError: The data set needs a package that is not installed.
    """
    return TASKS[config.task](config, device, processes)
