"""Learning curves as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vim.checkpoints.io import atomic_writer

_TRAIN, _RAW, _EMA, _GREY = "#8a8f98", "#1f6fb4", "#d1495b", "#5b6068"
_KINDS = (("train", "training, augmented", _TRAIN), ("val", "held out", _RAW), ("ema", "held out, EMA", _EMA))


def draw_curves(history: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw loss, accuracy and learning rate over the epochs into a PNG file.

    Args:
        history: One row an epoch, as in `summary.csv`.
        path: The file to make or replace.
        title: Printed over the curves.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=_GREY)
    loss, accuracy, rate = figure.subplots(1, 3)
    _draw_lines(loss, history, "loss", [(f"{kind}_loss", label, color) for kind, label, color in _KINDS])
    _draw_lines(
        accuracy, history, "top-1 accuracy, %", [(f"{kind}_top1", label, color) for kind, label, color in _KINDS]
    )
    _mark_best(accuracy, history)
    _draw_lines(rate, history, "learning rate", [("lr", "", _GREY)])
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch", color=_GREY)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    with atomic_writer(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _draw_lines(axes: Any, history: Sequence[Mapping[str, Any]], title: str, lines: list[tuple[str, str, str]]) -> None:
    for name, label, color in lines:
        points = [(row["epoch"], row[name]) for row in history if row.get(name) is not None]
        if points:
            marker = "o" if len(points) == 1 else None
            axes.plot(*zip(*points, strict=True), color=color, label=label, linewidth=1.8, marker=marker)
    axes.set_title(title, loc="left", fontsize=10, color=_GREY)
    axes.grid(axis="y", color="#e4e6ea", linewidth=0.8)
    axes.tick_params(colors=_GREY, labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#c3c7ce")
    if any(label for _, label, _ in lines):
        axes.legend(frameon=False, fontsize=8, labelcolor=_GREY)


def _mark_best(axes: Any, history: Sequence[Mapping[str, Any]]) -> None:
    """Mark the epoch of the best held-out accuracy, of either weights."""
    points = [
        (row[name], row["epoch"], color)
        for name, color in (("val_top1", _RAW), ("ema_top1", _EMA))
        for row in history
        if row.get(name) is not None
    ]
    if points:
        best, epoch, color = max(points, key=lambda point: (point[0], -point[1]))
        axes.plot([epoch], [best], "o", color=color, markersize=5)
        below = {"xytext": (0, -14), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{best:.1f} %", (epoch, best), fontsize=8, color=color, **below)
