"""Learning curves and confusion matrices as pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vim.checkpoints.io import atomic_writer
from vim.data.listing import printable

_TRAIN, _RAW, _EMA, _GREY = "#8a8f98", "#1f6fb4", "#d1495b", "#5b6068"
_MAX_NAMED_CLASSES = 30  # more names and numbers do not fit into a confusion matrix
_KINDS = (("train", "training, augmented", _TRAIN), ("val", "held out", _RAW), ("ema", "held out, EMA", _EMA))


def draw_curves(
    history: Sequence[Mapping[str, Any]],
    path: Path,
    title: str,
    figure_name: str = "top1",
    words: str = "top-1 accuracy, %",
) -> None:
    """Draw loss, a figure such as the accuracy, and learning rate over the epochs into a PNG file.

    Args:
        history: One row per epoch, as in `summary.csv`.
        path: The file to create or replace.
        title: Title of the picture.
        figure_name: The figure, in percent, as in the columns `val_NAME` of `summary.csv`.
        words: What the figure is.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(printable(title), x=0.01, ha="left", fontsize=11, color=_GREY, parse_math=False)
    loss, score, rate = figure.subplots(1, 3)
    _draw_lines(loss, history, "loss", [(f"{kind}_loss", label, color) for kind, label, color in _KINDS])
    _draw_lines(score, history, words, [(f"{kind}_{figure_name}", label, color) for kind, label, color in _KINDS])
    _mark_best(score, history, figure_name)
    _draw_lines(rate, history, "learning rate", [("lr", "", _GREY)])
    for axes in (loss, score, rate):
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


def _mark_best(axes: Any, history: Sequence[Mapping[str, Any]], figure_name: str) -> None:
    """Mark the epoch of the best held-out figure, of raw or averaged weights."""
    points = [
        (row[name], row["epoch"], color)
        for name, color in ((f"val_{figure_name}", _RAW), (f"ema_{figure_name}", _EMA))
        for row in history
        if row.get(name) is not None
    ]
    if points:
        best, epoch, color = max(points, key=lambda point: (point[0], -point[1]))
        axes.plot([epoch], [best], "o", color=color, markersize=5)
        below = {"xytext": (0, -14), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{best:.1f} %", (epoch, best), fontsize=8, color=color, **below)


def draw_confusion(confusion: Tensor, class_names: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix into a PNG file, in percent of each class.

    Args:
        confusion: Images by class (rows) and guess (columns), (classes, classes).
        class_names: Name of each class; shown for up to 30 classes.
        path: The file to create or replace.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    named = len(class_names) <= _MAX_NAMED_CLASSES
    side = max(4.5, 1.5 + 0.45 * len(class_names)) if named else 8.0
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(100 * shares.numpy(), cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, fraction=0.046, label="% of the class")
    axes.set_xlabel("guess", color=_GREY)
    axes.set_ylabel("class", color=_GREY)
    axes.tick_params(colors=_GREY, labelsize=8)
    if named:
        places, names = range(len(class_names)), [printable(name) for name in class_names]
        axes.set_xticks(places, names, rotation=45, ha="right", parse_math=False)
        axes.set_yticks(places, names, parse_math=False)
        for row in places:
            for column in places:
                if confusion[row, column] > 0:
                    color = "white" if shares[row, column] > 0.5 else _GREY
                    text = f"{100 * shares[row, column]:.0f}"
                    axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    with atomic_writer(path) as file:
        figure.savefig(file, format="png", dpi=120)
