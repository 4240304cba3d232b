"""`python -m vim.train`: train a model on labelled images; without arguments, a small Vim on the digits."""

import importlib.util
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from pathlib import Path

    from vim.runtime.distributed import Processes
    from vim.training.run_folder import RunFolder
    from vim.training.trainer import Trainer

_NEEDED = ("jsonargparse", "rich", "matplotlib", "sklearn")
# What may go wrong with a report: images that are gone, a full disk, a missing package, memory, an impatient user.
_REPORT_PROBLEMS = (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError, KeyboardInterrupt)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments, without the name of the program; `None` is `sys.argv`.

    Returns:
        The exit code: 0 if the run is complete or was saved after SIGTERM, 1 if it failed, 2 for arguments that cannot
        be used, or 130 if it was interrupted.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        return _fail(f'training needs {names}: pip install "vimamba[train]", or -e ".[train]" in a clone', 2)
    arguments = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"}.intersection(arguments):
        from vim.config.load import parse_command_line

        try:
            parse_command_line(arguments)  # exits, before PyTorch is imported
        except (ValueError, TypeError) as error:
            return _fail(str(error), 2)
    from vim.runtime.distributed import JoinError, Refused, join_processes
    from vim.runtime.terminal import show_any_name

    show_any_name()
    try:
        with join_processes() as processes:
            try:
                trainer = _prepare(arguments, processes)
            except Refused as error:
                return _fail(str(error), 2) if processes.is_main else 2
            code, best = _train(trainer)
    except JoinError as error:
        return _fail(str(error), 2)
    if best is not None and trainer.processes.is_main:
        _conclude(trainer, best)  # alone: the other processes need not wait for the report
    return code


def _prepare(argv: Sequence[str], processes: "Processes") -> "Trainer":
    """Read the command line, open the data and build the model, for a new run or a resumed one."""
    from vim.config.load import parse_command_line
    from vim.training.run_folder import RunFolder, choose_run_folder
    from vim.training.trainer import Trainer

    command = processes.together(lambda: parse_command_line(argv))

    def choose() -> RunFolder | None:
        if command.resume is not None:
            folder = RunFolder(command.resume)
            folder.starts()  # to find a damaged record before the run resumes
            return folder
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
            return _restarted_folder(command.output)
        return choose_run_folder(command.config, command.output) if processes.is_main else None

    def build() -> Trainer:
        trainer = Trainer(command.config, folder, processes=processes)
        trainer.resume()  # does nothing in a new folder
        return trainer

    folder = cast(RunFolder, processes.broadcast(processes.together(choose)))  # the main process has chosen one
    return processes.together(build)


def _restarted_folder(output: "Path | None") -> "RunFolder":
    """Return the folder of a run that torchrun has restarted."""
    from vim.training.run_folder import RunFolder

    if output is None:
        raise ValueError("--output must name the folder of a run that torchrun restarts, or each start makes a new one")
    return RunFolder(output)


def _train(trainer: "Trainer") -> tuple[int, dict[str, Any] | None]:
    """Train; return the exit code and, of a run that is complete, the best epoch."""
    from vim.runtime.agreement import Disagreement
    from vim.runtime.preemption import RunStopped
    from vim.runtime.terminal import write_out
    from vim.training.nonfinite import NonFiniteError
    from vim.training.run_lock import FolderInUse

    folder = shlex.quote(str(trainer.folder.path))
    resume = f"python -m vim.train --resume {folder}"
    is_main = trainer.processes.is_main

    def resume_hint() -> str:
        return f"; carry on with: {resume}" if trainer.folder.last.exists() else ""

    try:
        return 0, trainer.fit()
    except (Disagreement, FolderInUse) as error:
        code, message = 2, str(error)
    except NonFiniteError as error:
        code, message = 1, str(error)
    except OSError as error:  # a full disk, a read-only folder, missing images
        return _fail(f"{error}{resume_hint()}", 1), None
    except RunStopped as stopped:
        if is_main:
            write_out(f"{stopped}; carry on with: {resume}\n")
        return 0, None
    except KeyboardInterrupt:
        code, message = 130, f"interrupted after step {trainer.position.step}{resume_hint()}"
    return (_fail(message, code) if is_main else code), None


def _conclude(trainer: "Trainer", best: Mapping[str, Any]) -> None:
    """Print the result, write the report, and print the next command."""
    from vim.runtime.terminal import write_out

    weights = "averaged weights" if best["weights"] == "ema" else "weights"
    write_out(f"best: {trainer.task.describe_best(best)} ({weights} after epoch {best['epoch']})\n")
    write_out(f"files: {trainer.folder.path}\n")
    if trainer.config.log.report:
        write_out(f"report: {_report(trainer)}\n")
    folder, image = shlex.quote(str(trainer.folder.path)), shlex.quote(trainer.example_image())
    write_out(f"next: python -m vim.predict {folder} {image}\n")


def _report(trainer: "Trainer") -> str:
    """Write the report and return its path, or say why there is none: the run is complete either way."""
    folder = trainer.folder
    try:
        from vim.explain.report import write_report

        return str(write_report(folder.path, device=trainer.device))
    except _REPORT_PROBLEMS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"not written ({reason}); try again with: python -m vim.report {shlex.quote(str(folder.path))}"


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"vim.train: {message}\n")
    return code


if __name__ == "__main__":
    from vim.runtime.command import run_command

    run_command("vim.train", main, files_matter=True)
