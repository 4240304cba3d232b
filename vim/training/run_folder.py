"""The folder of a run: the names of its files, the settings and the record of its starts."""

import datetime
import json
from pathlib import Path
from typing import Any

import torch

from vim.checkpoints.io import write_text
from vim.config.load import CONFIG_FILE, dump_config
from vim.config.schema import TrainConfig
from vim.data.listing import printable
from vim.runtime.machine import describe_environment
from vim.training.run_lock import RunLock

_HEADER = """# The settings of this run, resolved. To start another like it:
#   python -m vim.train --config {path}
"""


class RunFolder:
    """The files of a run.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / CONFIG_FILE
        self.environment = path / "environment.json"
        self.summary = path / "summary.csv"
        self.curves = path / "curves.png"
        self.predictions = path / "predictions.png"
        self.last = path / "last.pth"
        self.best = path / "best.pth"
        self.best_weights = path / "best.safetensors"
        self.report = path / "report.html"
        self.samples = path / "samples"
        self.images = path / "images.json.gz"
        self.lock = RunLock(path / ".lock")

    def write_start(self, config: TrainConfig, device: torch.device) -> None:
        """Write the settings, and add this start of the run to `environment.json`."""
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.glob(".*.tmp"):  # from a run that was killed while writing
            leftover.unlink()
        write_text(self.config, _HEADER.format(path=self.config) + dump_config(config))
        write_text(self.environment, json.dumps([*self.starts(), describe_environment(device)], indent=2) + "\n")

    def starts(self) -> list[Any]:
        """Return the environment of each start of the run, as recorded in `environment.json`.

        Raises:
            ValueError: The file is damaged.
        """
        if not self.environment.exists():
            return []
        try:
            starts = json.loads(self.environment.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.environment} is not JSON ({error}): move it away") from error
        if not isinstance(starts, list):
            raise ValueError(
                f"{self.environment} must hold a list of starts, got {type(starts).__name__}: move it away"
            )
        return starts


def choose_run_folder(config: TrainConfig, output: Path | None) -> RunFolder:
    """Return the folder for a new run: `output`, or a new name under `runs/`.

    Raises:
        ValueError: `output` is a file, is not empty, or has a name that is not text.
    """
    if output is not None:
        if printable(str(output)) != str(output):  # TensorBoard cannot write into it
            raise ValueError(f"--output must be a name in UTF-8, got {printable(str(output))}")
        if output.exists() and not output.is_dir():
            raise ValueError(f"--output must be a folder, and {output} is a file")
        if output.is_dir() and any(output.iterdir()):
            raise ValueError(
                f"--output must be a new or an empty folder, and {output} is not empty: "
                f"name another, or carry that run on with --resume {output}"
            )
        return RunFolder(output)
    stem = f"{config.recipe}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    path, copies = Path("runs") / stem, 1
    while path.exists():
        copies += 1
        path = Path("runs") / f"{stem}-{copies}"
    return RunFolder(path)
