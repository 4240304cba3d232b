"""A training run as one HTML file that needs no network: what `python -m vim.report` writes."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

import torch

from vim.checkpoints.io import load_checkpoint, write_text
from vim.explain.classifier_report import classifier_contents
from vim.explain.pictures import embed
from vim.inference.trained_model import TrainedModel, load_trained_model
from vim.training.run_folder import RunFolder

_TEMPLATE = Path(__file__).with_name("report.html")


def write_report(run: Path, output: Path | None = None, device: torch.device | None = None) -> Path:
    """Write the report of a run; the best weights of a classifier are evaluated for it.

    Args:
        run: Folder of the run.
        output: The file to make or replace; `None` is `report.html` in the run's folder.
        device: Where to run the model; `None` is the CPU.

    Returns:
        The file.

    Raises:
        CheckpointError: The run's checkpoint is damaged.
        FileNotFoundError: The run has no checkpoint yet, or its images are gone.
        ModuleNotFoundError: Jinja or matplotlib is not installed.
        ValueError: `run` is not the folder of a run, or its images or settings cannot be used.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise ModuleNotFoundError('a report needs jinja2: pip install "vimamba[train]"')
    from jinja2 import Environment, StrictUndefined

    if not run.is_dir():
        raise ValueError(f"run must be the folder of a training run, got {run}")
    folder = RunFolder(run)
    path = folder.report if output is None else output
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(_TEMPLATE.read_text("utf-8"))
    write_text(path, template.render(_contents(folder, device or torch.device("cpu"))))
    return path


def _contents(folder: RunFolder, device: torch.device) -> dict[str, Any]:
    """Return what the template shows."""
    trained = load_trained_model(str(folder.path))
    config = trained.config
    if config is None:
        raise ValueError(f"{folder.path} must be the folder of a training run of vim.train: it has no settings")
    if trained.task == "classification":
        own = classifier_contents(trained, config, device)
    else:  # what the run drew and measured itself
        own = {"held_out": _best_figures(folder), "predictions": _embed_file(folder.predictions)}
    held_out = own.pop("held_out")
    return own | {
        "title": f"{config.recipe}: {config.model.name}",
        "subtitle": f"{config.data.dataset}, {config.model.image_shape[0]} x {config.model.image_shape[1]} pixels",
        "figures": [*held_out, *_run_figures(folder, trained)],
        "curves": _embed_file(folder.curves),
        "environment": _environment(folder),
        "settings": folder.config.read_text(encoding="utf-8", errors="backslashreplace"),
    }


def _best_figures(folder: RunFolder) -> list[tuple[str, str]]:
    """Return the held-out figures of the best epoch, as names and words."""
    found = load_checkpoint(folder.best)["figures"]
    named = {name: value for name, value in found.items() if name not in ("weights", "epoch", "loss")}
    return [
        (f"held out, {name.replace('_', ' ').replace('ap', 'AP').replace('miou', 'mIoU')}", f"{value:.2f} %")
        for name, value in named.items()
        if value is not None
    ]


def _run_figures(folder: RunFolder, trained: TrainedModel) -> list[tuple[str, str]]:
    """Return the size of the model and the time of the run, as names and words."""
    figures = [
        ("parameters", f"{sum(p.numel() for p in trained.model.parameters()) / 1e6:.2f} M"),
        ("weights", trained.weights),
    ]
    history = _read_summary(folder.summary)
    if history and trained.config is not None:
        epochs = f"{len(history)}" if trained.config.max_steps else f"{len(history)} of {trained.config.epochs}"
        seconds, speed = sum(seconds for seconds, _ in history), history[-1][1]
        figures += [("epochs", epochs), ("time", _duration(seconds)), ("training speed", f"{speed:,.0f} images/s")]
    return figures


def _embed_file(png: Path) -> str | None:
    return embed(png.read_bytes()) if png.is_file() else None


def _read_summary(path: Path) -> list[tuple[float, float]]:
    """Return seconds and images per second of each epoch.

    Raises:
        ValueError: The file is damaged.
    """
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [(float(row["seconds"]), float(row["images_per_second"])) for row in csv.DictReader(file)]
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise ValueError(f"{path} is not the summary that vim.train wrote ({error!r}): move it away") from error


def _environment(folder: RunFolder) -> list[tuple[str, str]]:
    """Return the facts of the run's last start, as names and words."""
    starts = folder.starts()
    last = starts[-1] if starts and isinstance(starts[-1], dict) else {}
    facts = {
        name: last[name]
        for name in ("started", "commit", "python", "platform", "cpus", "threads", "device")
        if name in last
    }
    versions = last.get("versions")
    facts |= versions if isinstance(versions, dict) else {}
    if len(starts) > 1:
        facts["starts"] = len(starts)
    return [(name, str(value)) for name, value in facts.items()]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
