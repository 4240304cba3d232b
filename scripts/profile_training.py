"""Profile the parts of an optimizer step.

    python scripts/profile_training.py [--config FILE] [--SETTING VALUE ...]

Runs 20 steps under torch.profiler, after 5 steps of warm-up, and prints the share of each part. The run folder is
deleted.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from vim.config.load import parse_command_line
from vim.runtime.preemption import RunStopped
from vim.training.run_folder import RunFolder
from vim.training.trainer import Trainer

_WARM_UP, _STEPS = 5, 20
_PARTS = ("vim: wait for images", "vim: forward", "vim: backward")


def main() -> None:
    config = parse_command_line(sys.argv[1:]).config
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, RunFolder(Path(folder) / "run"), Console(quiet=True))
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if trainer.device.type == "cuda" else [])
        profiler = profile(activities=activities)
        update = trainer._update

        def watched(*arguments: object) -> list[bool]:
            if trainer.position.step == _WARM_UP:
                profiler.start()
            stop, save = update(*arguments)  # type: ignore[arg-type]
            if trainer.device.type == "cuda":
                torch.cuda.synchronize()
            if trainer.position.step == _WARM_UP + _STEPS:
                profiler.stop()
                stop = True
            return [stop, save]

        trainer._update = watched  # type: ignore[method-assign]
        with contextlib.suppress(RunStopped):
            trainer.fit()
        times = {event.key: event.cpu_time_total for event in profiler.key_averages()}
    whole = times["vim: step"]
    print(f"{config.model.name}, batch {config.batch_size}: {whole / _STEPS / 1e3:.1f} ms a step on {trainer.device}")
    for part in _PARTS:
        print(f"{100 * times[part] / whole:5.1f} %  {part.removeprefix('vim: ')}")
    rest = whole - sum(times[part] for part in _PARTS)
    print(f"{100 * rest / whole:5.1f} %  clipping, optimizer, average, the rest")


if __name__ == "__main__":
    main()
