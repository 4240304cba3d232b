"""A training run as one HTML file that needs no network: what `python -m vim.report` writes."""

from __future__ import annotations

import base64
import csv
import heapq
import importlib.util
import io
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vim.checkpoints.io import write_text
from vim.data.loaders import build_eval_loader
from vim.data.preprocessing import Preprocessing
from vim.data.sources import open_eval_set
from vim.explain.attention import attention_rollout, hidden_attention, read_out_map
from vim.explain.modes import in_evaluation
from vim.explain.pictures import overlay
from vim.inference.plots import draw_confusion
from vim.inference.predictor import describe_classes
from vim.inference.trained_model import load_trained_model
from vim.models.vision_mamba import VisionMamba
from vim.runtime.precision import autocast
from vim.runtime.terminal import with_progress
from vim.training.run_folder import RunFolder

_MOST_MISTAKES = 12
_MOST_CLASSES = 100
_SIDE = 160  # pixels of the pictures of mistakes
_TEMPLATE = Path(__file__).with_name("report.html")


@dataclass(frozen=True, order=True)
class _Mistake:
    """An image that the model got wrong; ordered by how sure the model was."""

    share: float
    number: int
    label: int
    guess: int


def write_report(run: Path, output: Path | None = None, device: torch.device | None = None) -> Path:
    """Evaluate the best weights of a run and write its report.

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
    trained.check_task("classification")
    config = trained.config
    if config is None:
        raise ValueError(f"{folder.path} must be the folder of a training run of vim.train: it has no settings")
    model = trained.model.to(device)
    dataset, class_names = open_eval_set(config, config.data.val_split, trained.class_names)
    batches, unreadable = build_eval_loader(dataset, config, device)
    shown = with_progress(batches, "evaluating", len(batches))
    with in_evaluation(model):
        with autocast(device.type, config.precision):
            confusion, mistakes, pixels = _evaluate(model, shown, len(class_names))
        pictures = list(_draw_mistakes(model, mistakes, pixels, trained.preprocessing))
    names = describe_classes(class_names)
    rows = _class_rows(confusion, names)
    history = _read_summary(folder.summary)
    right = 100 * float(confusion.diagonal().sum()) / max(int(confusion.sum()), 1)
    figures = [("held out, top 1", f"{right:.2f} %"), ("held-out images", f"{int(confusion.sum()):,}")]
    if missing := unreadable.take():
        figures.append(("could not be read", f"{missing:,}"))
    figures += [
        ("parameters", f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"),
        ("weights", trained.weights),
    ]
    if history:
        seconds = sum(float(row["seconds"]) for row in history)
        figures += [
            ("epochs", f"{len(history)}" if config.max_steps else f"{len(history)} of {config.epochs}"),
            ("time", _duration(seconds)),
        ]
        figures += [("training speed", f"{float(history[-1]['images_per_second']):,.0f} images/s")]
    return {
        "title": f"{config.recipe}: {config.model.name}",
        "subtitle": f"{config.data.dataset}, {config.model.image_shape[0]} x {config.model.image_shape[1]} pixels",
        "figures": figures,
        "curves": _embed(folder.curves.read_bytes()) if folder.curves.is_file() else None,
        "classes": rows[:_MOST_CLASSES],
        "left_out": max(0, len(rows) - _MOST_CLASSES),
        "confusion": _confusion_picture(confusion, names),
        "has_maps": isinstance(model, VisionMamba),
        "mistakes": [
            {"number": m.number, "label": names[m.label], "guess": names[m.guess], "share": f"{100 * m.share:.0f} %"}
            | shown
            for m, shown in zip(mistakes, pictures, strict=True)
        ],
        "environment": _environment(folder),
        "settings": folder.config.read_text(encoding="utf-8"),
    }


@torch.inference_mode()
def _evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], num_classes: int
) -> tuple[Tensor, list[_Mistake], dict[int, Tensor]]:
    """Return the confusion matrix, the worst mistakes, the worst one first, and their images by number."""
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    worst: list[_Mistake] = []
    pixels: dict[int, Tensor] = {}
    number = 0
    for images, labels in batches:
        logits = model(images).float()
        guesses = logits.topk(min(5, num_classes)).indices[:, 0]  # among equal ones, the one that `evaluate` takes
        shares = logits.softmax(1).gather(1, guesses[:, None])[:, 0]
        pairs = zip(labels.tolist(), guesses.tolist(), shares.tolist(), strict=True)
        for index, (label, guess, share) in enumerate(pairs):
            confusion[label, guess] += 1
            if label != guess:
                mistake = _Mistake(share, number + index, label, guess)
                pixels[mistake.number] = images[index].cpu()
                heapq.heappush(worst, mistake)
                if len(worst) > _MOST_MISTAKES:
                    del pixels[heapq.heappop(worst).number]
        number += len(labels)
    return confusion, sorted(worst, reverse=True), pixels


def _draw_mistakes(
    model: nn.Module, mistakes: Sequence[_Mistake], pixels: dict[int, Tensor], preprocessing: Preprocessing
) -> Iterator[dict[str, str | None]]:
    """Yield each mistake's image, and where the model looked, as embedded pictures."""
    device = next(model.parameters()).device
    for mistake in mistakes:
        image = pixels[mistake.number].clone().to(device)
        photograph = preprocessing.as_photograph(image)
        seen = None
        if isinstance(model, VisionMamba):
            attention = hidden_attention(model, image[None], absolute=True)
            rollout = attention_rollout(attention)
            seen = read_out_map(rollout, attention.grid, attention.num_prefix_tokens)[0]
        yield {
            "image": _embed_picture(overlay(photograph, None, _SIDE)),
            "map": None if seen is None else _embed_picture(overlay(photograph, seen, _SIDE)),
        }


def _class_rows(confusion: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for each class, the class with the fewest right answers first."""
    rows = []
    for label, name in enumerate(names):
        images, right = int(confusion[label].sum()), int(confusion[label, label])
        wrong = confusion[label].clone()
        wrong[label] = 0
        most = int(wrong.argmax())
        share = 100 * right / images if images else 0.0
        rows.append(
            {
                "name": name,
                "images": images,
                "share": f"{share:.1f} %" if images else "",
                "width": f"{share:.1f}",
                "confused": f"{names[most]} ({int(wrong[most])})" if int(wrong[most]) else "",
                "order": share if images else 101.0,
            }
        )
    return sorted(rows, key=lambda row: row["order"])


def _confusion_picture(confusion: Tensor, names: Sequence[str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "confusion.png"
        draw_confusion(confusion, tuple(names), path)
        return _embed(path.read_bytes())


def _read_summary(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


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


def _embed(png: bytes) -> str:
    """Return a PNG file as the address of a picture."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _embed_picture(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return _embed(file.getvalue())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
