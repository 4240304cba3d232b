"""The interface between the trainer and a task: data, model, loss, metric and pictures."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from vim.runtime.distributed import Processes

Figures = Mapping[str, float | None]


class Batch(NamedTuple):
    """A micro-batch of training images."""

    images: Tensor
    """(batch, in_chans, height, width), normalised, on the device."""
    targets: Any
    """Whatever the loss of the task compares the model's output with, on the device."""
    place: tuple[int, int]
    """Epoch, and number of the batch in it over all processes. With the seed it decides every random choice."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The result of evaluating a model on the held-out images."""

    figures: dict[str, float | None]
    """Figures by name, `loss` among them; each becomes a column of `summary.csv`. The names never change in a run."""
    unreadable: int
    """Held-out images that could not be read and are missing from the figures."""


class Task(Protocol):
    """Everything that differs between classification, segmentation, detection and pre-training.

    The trainer takes the steps, averages the weights, evaluates, saves and resumes; it knows a task through this
    interface only. `vim.tasks.registry` maps the setting `task` to a class, which is called with the settings, the
    device and the processes of the run. The constructor opens the data and raises `ValueError` if it does not fit the
    settings. It draws nothing from the global random generators, so that the model begins the same with any data.
    """

    sums: tuple[str, ...]
    """Names of the counts that `training_loss` returns, such as `hits`. The trainer adds them up over an epoch."""
    headline: tuple[str, ...]
    """Names of the figures that a checkpoint records for the best epoch; `score` reads only these."""

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of this process in an epoch."""
        ...

    def build_model(self, starting_weights: bool) -> nn.Module:
        """Build the model, on the CPU.

        Args:
            starting_weights: Load the pretrained weights that the settings name. False leaves them out, for a run whose
                checkpoint replaces them.
        """
        ...

    def image_shape(self, epoch: int) -> tuple[int, int]:
        """Return height and width of the images that the model is trained on in an epoch, counted from 0."""
        ...

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """Return the micro-batches of this process in an epoch, without the first ones.

        Args:
            epoch: Epochs before this one.
            first: Micro-batches to leave out, unread: the run was interrupted after them.
        """
        ...

    def training_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run the model on a micro-batch, in the precision of the settings.

        Returns:
            The mean loss, a scalar, and the counts that `sums` names, (len(sums),); both float32 on the device.
        """
        ...

    def take_unreadable(self) -> int:
        """Return how many training images could not be read since the last call, in this process."""
        ...

    def training_figures(self, sums: Mapping[str, float], images: int) -> dict[str, float]:
        """Return the training figures of an epoch by name, without the loss.

        Args:
            sums: The counts of all processes so far, by the names in `sums`.
            images: Training images so far.
        """
        ...

    def evaluate(self, model: nn.Module, processes: Processes, stop_asked: Callable[[], bool]) -> Evaluation:
        """Evaluate a model on the held-out images; every process must call it, and gets the same result.

        Args:
            model: The model.
            processes: The processes that share the images.
            stop_asked: Returns True if this process was asked to stop.

        Raises:
            EvaluationStopped: A process was asked to stop.
        """
        ...

    def score(self, figures: Figures) -> tuple[float, ...]:
        """Return a key to compare evaluations by; the epoch with the largest one is the best."""
        ...

    def describe_data(self) -> list[str]:
        """Return lines about the data, shown when the run starts."""
        ...

    def describe_training(self, figures: Figures) -> str:
        """Return the training figures in a few words, for the progress bar."""
        ...

    def describe_epoch(self, row: Mapping[str, Any]) -> str:
        """Return the figures of an epoch in a few words.

        Args:
            row: The row of `summary.csv`, whose held-out figures begin with `val_`, or `ema_` for averaged weights.
        """
        ...

    def describe_best(self, best: Figures) -> str:
        """Return the headline figures of the best epoch in a few words."""
        ...

    def draw_curves(self, history: Sequence[Mapping[str, Any]], path: Path) -> None:
        """Draw the figures of all epochs into a PNG file."""
        ...

    def write_samples(self, folder: Path) -> None:
        """Write some held-out images into a folder, for the user to look at; may write none."""
        ...

    def example_image(self) -> Path | None:
        """Return a held-out image that is a file of its own, or `None`."""
        ...

    def facts(self) -> Iterator[tuple[str, Any]]:
        """Yield the facts about the data, by name, that all processes must agree on."""
        ...

    def write_data_record(self, path: Path) -> None:
        """Write down which images the run has."""
        ...

    def data_changes(self, path: Path) -> list[str]:
        """Return lines on how the images differ from the record in a file.

        Raises:
            ValueError: The file is damaged.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold of the task, such as the names of the classes; plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that a checkpoint belongs to this task.

        Args:
            state: The checkpoint, with the keys of `state_dict` and others.

        Raises:
            ValueError: It belongs to other data.
        """
        ...

    def weights_metadata(self) -> dict[str, str]:
        """Return the header of the best weights as a safetensors file, with which they can be used on their own."""
        ...
