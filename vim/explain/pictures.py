"""Explanations as pictures: heat maps over the photograph, side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vim.checkpoints.io import atomic_writer
from vim.data.listing import printable
from vim.explain.receptive_field import ReceptiveField

_GREY, _LINE, _COLORS, _OPACITY = "#5b6068", "white", "inferno", 0.6
_PANEL_SIDE = 384  # pixels of the longer side of a panel's picture


def draw_explanation(
    photograph: Tensor, maps: Sequence[tuple[str, Tensor]], guesses: Sequence[tuple[str, float]], path: Path
) -> None:
    """Draw a photograph, heat maps over it, and the likeliest classes into a PNG file.

    Args:
        photograph: (channels, height, width), from 0 to 1; 1, 3 or 4 channels.
        maps: Titles, and maps of any size, (rows, columns); each is stretched from its least to its largest value.
        guesses: Names of classes and their probabilities, the likeliest first.
        path: The file to make or replace.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = _figure(2.6 * (2 + len(maps)), 3.0)
    axes = figure.subplots(1, 2 + len(maps))
    pixels = _as_picture(photograph)
    _show(axes[0], pixels, "image")
    for place, (title, values) in zip(axes[1:], maps, strict=False):
        _show(place, pixels, title)
        _overlay(place, values, pixels.shape[:2])
    _draw_guesses(axes[-1], guesses)
    _save(figure, path)


class Panel(NamedTuple):
    """A picture with a title, a heat map and an outline over it."""

    title: str
    picture: Tensor
    """(3, height, width), uint8."""
    values: Tensor | None = None
    """A map of any size, (rows, columns)."""
    outline: Tensor | None = None
    """What the line is drawn around, of any size, (rows, columns), bool."""


def draw_panels(rows: Sequence[Sequence[Panel]], path: Path) -> None:
    """Draw rows of panels into a PNG file.

    Args:
        rows: At least one, each with at least one panel.
        path: The file to make or replace.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    columns = max(map(len, rows))
    height, width = rows[0][0].picture.shape[1:]
    figure = _figure(2.6 * columns, len(rows) * (2.6 * height / width + 0.3))
    places = figure.subplots(len(rows), columns, squeeze=False)
    for place in places.flatten():
        place.set_axis_off()
    for line, panels in zip(places, rows, strict=True):
        for place, panel in zip(line, panels, strict=False):
            _draw_panel(place, panel)
    _save(figure, path)


def _draw_panel(axes: Any, panel: Panel) -> None:
    size = _fit(panel.picture.shape[1:], _PANEL_SIDE)
    pixels = F.interpolate(panel.picture[None].float() / 255, size, mode="bilinear", antialias=True)[0]
    _show(axes, _as_picture(pixels), panel.title)
    if panel.values is not None:
        _overlay(axes, panel.values, size)
    if panel.outline is not None:
        inside = F.interpolate(panel.outline[None, None].float(), size)[0, 0]
        edged = F.pad(inside[None, None], (1, 1, 1, 1))[0, 0]  # so that a line closes at the picture's edges
        axes.contour(range(-1, size[1] + 1), range(-1, size[0] + 1), edged.numpy(), [0.5], colors=_LINE, linewidths=0.8)
        axes.set_xlim(-0.5, size[1] - 0.5)
        axes.set_ylim(size[0] - 0.5, -0.5)


def _fit(shape: Sequence[int], side: int) -> tuple[int, int]:
    """Return height and width of a picture whose longer side has a number of pixels."""
    height, width = (max(1, side * length // max(shape)) for length in shape)
    return height, width


def overlay(photograph: Tensor, values: Tensor | None, side: int) -> Image.Image:
    """Return a photograph, with a heat map over it, as a picture.

    Args:
        photograph: (channels, height, width), from 0 to 1; 1, 3 or 4 channels.
        values: The map, (rows, columns), or `None`.
        side: Length of the picture's longer side in pixels.
    """
    size = _fit(photograph.shape[1:], side)
    pixels = F.interpolate(photograph.detach().cpu().float().clamp(0, 1)[None, :3], size, mode="bilinear")[0]
    pixels = pixels.expand(3, -1, -1)
    if values is not None:
        import matplotlib

        heat = torch.from_numpy(matplotlib.colormaps[_COLORS](_stretch(values, size).numpy()))[..., :3].permute(2, 0, 1)
        pixels = torch.lerp(pixels, heat.float(), _OPACITY)
    return Image.fromarray((255 * pixels).round().byte().permute(1, 2, 0).numpy())


def draw_receptive_fields(fields: Sequence[tuple[str, ReceptiveField]], path: Path, columns: int | None = None) -> None:
    """Draw receptive fields into a PNG file, on a logarithmic scale of colours.

    Args:
        fields: Titles and fields.
        path: The file to make or replace.
        columns: Number of fields in a row; `None` puts all into one.
    """
    columns = len(fields) if columns is None else columns
    rows = -(-len(fields) // columns)
    figure = _figure(2.8 * columns, 3.5 * rows)
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    for place in places[len(fields) :]:
        place.set_axis_off()
    for place, (title, field) in zip(places, fields, strict=False):
        # The original figure's scale: a thousandth of the largest gradient is black.
        place.imshow(field.map.clamp_min(1e-3).log10().numpy(), cmap=_COLORS, vmin=-3, vmax=0)
        _title(place, f"{title}\nhalf of it in {100 * field.area(0.5):.0f} % of the image")
        place.plot(field.center[1], field.center[0], "+", color="white", markersize=6)
    _save(figure, path)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    with atomic_writer(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _as_picture(photograph: Tensor) -> Any:
    """Return pixels as matplotlib takes them, (height, width, 3) or (height, width, 4)."""
    pixels = photograph.detach().cpu().float().clamp(0, 1)
    pixels = pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels
    return pixels.permute(1, 2, 0).numpy()


def _title(axes: Any, text: str) -> None:
    axes.set_title(printable(text), fontsize=9, color=_GREY, loc="left", parse_math=False)
    axes.set_axis_off()


def _show(axes: Any, pixels: Any, title: str) -> None:
    axes.imshow(pixels)
    _title(axes, title)


def _overlay(axes: Any, values: Tensor, size: tuple[int, int]) -> None:
    axes.imshow(_stretch(values, size).numpy(), cmap=_COLORS, alpha=_OPACITY, vmin=0, vmax=1)


def _stretch(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a map of another size, from 0 to 1."""
    values = values.detach().cpu().float()
    low, high = torch.aminmax(values)
    values = (values - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    return F.interpolate(values[None, None], size, mode="bilinear", align_corners=False)[0, 0]


def _draw_guesses(axes: Any, guesses: Sequence[tuple[str, float]]) -> None:
    names = [printable(name if len(name) <= 28 else name[:27] + "…") for name, _ in guesses]
    shares = [100 * share for _, share in guesses]
    axes.barh(range(len(shares)), shares, color="#1f6fb4", height=0.35)
    for place, (name, share) in enumerate(zip(names, shares, strict=True)):
        axes.text(0, place - 0.3, f"{name}  {share:.1f} %", fontsize=8, color=_GREY, va="bottom", parse_math=False)
    axes.set_xlim(0, 100)
    axes.set_ylim(max(len(shares) - 0.4, 0.6), -0.8)
    axes.set_axis_off()


def embed(png: bytes) -> str:
    """Return a PNG file as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def embed_picture(picture: Image.Image) -> str:
    """Return a picture as an address that holds its PNG file."""
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return embed(file.getvalue())
