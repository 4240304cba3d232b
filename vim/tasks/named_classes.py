"""What tasks on images with named classes have in common: the record of the images, and the names in checkpoints."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vim.config.schema import TrainConfig
from vim.data.contents import SplitContents, class_changes
from vim.inference.trained_model import weights_metadata
from vim.tasks.data_record import changes_since_record, describe_data, write_record


class NamedClassesTask:
    """The methods of `vim.tasks.task.Task` that depend on the names of the classes and the list of the images only.

    Args:
        config: The settings of the run.
        class_names: Name of each class.
        contents: The images of each split.
    """

    def __init__(
        self, config: TrainConfig, class_names: tuple[str, ...], contents: Mapping[str, SplitContents]
    ) -> None:
        self._config = config
        self.class_names = class_names
        self._contents = contents

    def _describe_images(self, images: str, passed_over: Counter[str]) -> list[str]:
        """Return lines with the number of images and the first classes; see `vim.tasks.data_record.describe_data`."""
        return describe_data(self._config, self._contents, images, passed_over)

    def write_data_record(self, path: Path) -> None:
        """Write the images of both splits into a file."""
        write_record(path, self._contents)

    def data_changes(self, path: Path) -> list[str]:
        """Return lines on how the images differ from the record in a file."""
        return changes_since_record(path, self._contents)

    def state_dict(self) -> dict[str, Any]:
        """Return the names of the classes."""
        return {"class_names": list(self.class_names)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise `ValueError` if a checkpoint has other classes."""
        changes = class_changes(state["class_names"], self.class_names)
        if changes is not None:
            raise ValueError(
                f"the classes of the data are not what they were: {changes}, and their labels would mean others"
            )

    def weights_metadata(self) -> dict[str, str]:
        """Return the settings and the names of the classes, as the header of a safetensors file."""
        return weights_metadata(self._config, self.class_names)
