"""The part of a report that a classifier has of its own: right answers by class, confusions, the worst mistakes."""

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vim.config.schema import TrainConfig
from vim.data.loaders import build_eval_loader
from vim.data.preprocessing import Preprocessing
from vim.data.sources import open_eval_set
from vim.explain.attention import attention_rollout, hidden_attention, read_out_map
from vim.explain.modes import in_evaluation
from vim.explain.pictures import embed, embed_picture, overlay
from vim.inference.plots import draw_confusion
from vim.inference.predictor import describe_classes
from vim.inference.trained_model import TrainedModel
from vim.models.vision_mamba import VisionMamba
from vim.runtime.precision import autocast
from vim.runtime.terminal import with_progress

_MOST_MISTAKES = 12
_MOST_CLASSES = 100
_SIDE = 160  # pixels of the pictures of mistakes


@dataclass(frozen=True, order=True)
class _Mistake:
    """An image that the model got wrong; ordered by how sure the model was."""

    share: float
    number: int
    label: int
    guess: int


def classifier_contents(trained: TrainedModel, config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """Evaluate a classifier on the held-out images of its run, and return what the template shows of it.

    Args:
        trained: The model of the run.
        config: The settings of the run.
        device: Where to run the model.

    Raises:
        FileNotFoundError: The images are gone.
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: The images or the settings cannot be used.
    """
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
    right = 100 * float(confusion.diagonal().sum()) / max(int(confusion.sum()), 1)
    figures = [("held out, top 1", f"{right:.2f} %"), ("held-out images", f"{int(confusion.sum()):,}")]
    if missing := unreadable.take():
        figures.append(("could not be read", f"{missing:,}"))
    return {
        "held_out": figures,
        "classes": rows[:_MOST_CLASSES],
        "left_out": max(0, len(rows) - _MOST_CLASSES),
        "confusion": _confusion_picture(confusion, names),
        "has_maps": isinstance(model, VisionMamba),
        "mistakes": [
            {"number": m.number, "label": names[m.label], "guess": names[m.guess], "share": f"{100 * m.share:.0f} %"}
            | shown
            for m, shown in zip(mistakes, pictures, strict=True)
        ],
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
            "image": embed_picture(overlay(photograph, None, _SIDE)),
            "map": None if seen is None else embed_picture(overlay(photograph, seen, _SIDE)),
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
        return embed(path.read_bytes())
