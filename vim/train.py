"""`python -m vim.train`: train a model on labelled images; without arguments a small Vim on the digits."""

import importlib.util
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    from pathlib import Path

    from vim.engine.distributed import Processes
    from vim.engine.run_folder import RunFolder
    from vim.engine.trainer import Trainer

_T = TypeVar("_T")
_NEEDED = ("jsonargparse", "rich", "matplotlib", "sklearn")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments, without the name of the program; `None` takes those of the process.

    Returns:
        The exit code: 0 when the run is complete or was stopped by SIGTERM and saved, 1 when it failed on the way,
        2 when what was asked for cannot be done, 130 when it was interrupted.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        return _fail(f'training needs {names}: pip install "vimamba[train]", or -e ".[train]" in a clone', 2)
    from vim.engine.distributed import JoinError, join_processes

    try:
        with join_processes() as processes:
            try:
                trainer = _prepare(sys.argv[1:] if argv is None else argv, processes)
            except _Refused as error:
                return _fail(str(error), 2) if processes.is_main else 2
            return _train(trainer)
    except JoinError as error:
        return _fail(str(error), 2)


class _Refused(Exception):
    """What was asked for cannot be done, in one of the processes at least."""


def _prepare(argv: Sequence[str], processes: "Processes") -> "Trainer":
    """Read the command line, open the data and build the model, for a new run or for one that is carried on."""
    from vim.config.load import parse_command_line
    from vim.engine.run_folder import RunFolder, choose_run_folder
    from vim.engine.trainer import Trainer

    command = _together(processes, lambda: parse_command_line(argv))

    def choose() -> RunFolder | None:
        if command.resume is not None:
            folder = RunFolder(command.resume)
            folder.starts()  # to find a damaged record before the run goes on
            return folder
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
            return _restarted_folder(command.output)
        return choose_run_folder(command.config, command.output) if processes.is_main else None

    def build() -> Trainer:
        trainer = Trainer(command.config, folder, processes=processes)
        trainer.resume()  # does nothing in a new folder
        return trainer

    folder = cast(RunFolder, processes.broadcast(_together(processes, choose)))  # the main process has chosen one
    return _together(processes, build)


def _together(processes: "Processes", action: Callable[[], _T]) -> _T:
    """Do something in all processes; if it fails in one it fails in all, for else the others would wait for it."""
    result, error = None, None
    try:
        result = action()
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as problem:
        error = str(problem)
    errors = [message for message in processes.gather(error) if message is not None]
    if errors:
        raise _Refused(errors[0])
    return cast(_T, result)


def _restarted_folder(output: "Path | None") -> "RunFolder":
    """Return the folder to carry on in, where torchrun has started the processes of a run once more."""
    from vim.engine.run_folder import RunFolder

    if output is None:
        raise ValueError("--output must name the folder of a run that torchrun restarts, or each start makes a new one")
    return RunFolder(output)


def _train(trainer: "Trainer") -> int:
    """Train, and say what to do next."""
    from vim.engine.nonfinite import NonFiniteError
    from vim.engine.stop import RunStopped

    folder = shlex.quote(str(trainer.folder.path))
    carry_on = f"python -m vim.train --resume {folder}"
    is_main = trainer.processes.is_main

    def how_to_carry_on() -> str:
        return f"; carry on with: {carry_on}" if trainer.folder.last.exists() else ""

    try:
        best = trainer.fit()
    except NonFiniteError as error:
        return _fail(str(error), 1) if is_main else 1
    except OSError as error:  # a full disk, a folder that nobody may write to, images that are gone
        return _fail(f"{error}{how_to_carry_on()}", 1)
    except RunStopped as stopped:
        if is_main:
            sys.stdout.write(f"{stopped}; carry on with: {carry_on}\n")
        return 0
    except KeyboardInterrupt:
        return _fail(f"interrupted after step {trainer.position.step}{how_to_carry_on()}", 130) if is_main else 130
    if not is_main:
        return 0
    weights = "averaged weights" if best["weights"] == "ema" else "weights"
    lines = [
        f"best: {best['top1']:.2f} % of the held-out images right ({weights} after epoch {best['epoch']})",
        f"files: {trainer.folder.path}",
        f"next: python -m vim.predict {folder} {shlex.quote(trainer.example_image())}",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"vim.train: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
