"""`python -m vim.train`: train a model on labelled images; without arguments a small Vim on the digits."""

import importlib.util
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vim.config.load import Command
    from vim.engine.trainer import Trainer

_NEEDED = ("jsonargparse", "rich", "matplotlib", "sklearn")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments, without the name of the program; `None` takes those of the process.

    Returns:
        The exit code: 0 when the run is complete, 1 when it failed on the way, 2 when what was asked for cannot be
        done, 130 when it was interrupted.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        return _fail(f'training needs {names}: pip install "vimamba[train]", or -e ".[train]" in a clone', 2)
    from vim.config.load import parse_command_line

    try:
        command = parse_command_line(sys.argv[1:] if argv is None else argv)
        trainer = _prepare(command)
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        return _fail(str(error), 2)
    return _train(trainer)


def _prepare(command: "Command") -> "Trainer":
    """Open the data and build the model, for a new run or for one that is carried on."""
    from vim.engine.run_folder import RunFolder, choose_run_folder
    from vim.engine.trainer import Trainer

    if command.resume is None:
        return Trainer(command.config, choose_run_folder(command.config, command.output))
    trainer = Trainer(command.config, RunFolder(command.resume))
    trainer.resume()
    return trainer


def _train(trainer: "Trainer") -> int:
    """Train, and say what to do next."""
    from vim.engine.trainer import NonFiniteError

    folder = shlex.quote(str(trainer.folder.path))
    try:
        best = trainer.fit()
    except NonFiniteError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        how = f"; carry on with: python -m vim.train --resume {folder}" if trainer.folder.last.exists() else ""
        return _fail(f"interrupted after epoch {trainer.epoch}{how}", 130)
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
