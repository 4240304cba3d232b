"""Explain segmentations and detections image by image, each class or box for itself: a part of `vim.explain`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vim.explain.attention import attention_rollout, hidden_attention, read_out_map
from vim.explain.cells import Cells, cut_to_image
from vim.explain.checks import NothingToExplainError, check_methods, check_vision_mamba, class_number, using_image
from vim.explain.dense_activation import DenseActivation, box_activation, segment_activation
from vim.explain.names import DEFAULT_DENSE_EXPLANATIONS, DENSE_EXPLANATIONS, METHODS
from vim.explain.pictures import Panel, draw_panels
from vim.inference.detection_pictures import draw_enlarged
from vim.inference.mask_pictures import image_of, overlay
from vim.inference.object_finder import ObjectFinder
from vim.inference.segmenter import SegmentImages
from vim.inference.trained_model import TrainedModel

_LEAST_SCORE = 0.5  # of an object that is explained, as vim.predict shows them
# What does not depend on the class or the box.
_OF_THE_IMAGE = {
    "attention": "attention of all patches",
    "rollout": "attention through all layers",
    "eigencam": "eigencam",
}


@dataclass(frozen=True)
class _Answer:
    """What a model says of an image, and how to ask why."""

    photograph: Tensor
    """(3, height, width), uint8."""
    prediction: Tensor
    """The photograph with the prediction drawn over it, uint8, of any size."""
    explained: list[tuple[str, float]]
    """Name and share or score of each class or box that is explained."""
    outlines: list[Tensor]
    """Where each of them is, (height, width), bool."""
    windows: Sequence[Tensor]
    """What the backbone gets, (in_chans, height, width) each."""
    starts: Sequence[tuple[int, int]]
    """First row and first column of each window."""
    shape: tuple[int, int]
    """Height and width of the image in the windows."""
    activation: Callable[[], DenseActivation]
    """Takes the maps of the model with a score for each class or box."""


class DenseExplainer:
    """A trained segmentation model or detector with the explanations to draw of its answers.

    Args:
        trained: The model, from `load_trained_model`.
        device: Device to run it on.
        methods: Names from `DENSE_EXPLANATIONS`; `None` is the default of the task.
        target: Name or number, from 0, of the class to explain; `None` takes the largest classes of an image, or its
            boxes of all classes.
        topk: The most classes or boxes to explain in an image.

    Raises:
        TypeError: A method needs a VisionMamba, and the backbone is another model.
        ValueError: The model classifies, a method or the class is unknown, or `topk` is less than 1.
    """

    def __init__(
        self,
        trained: TrainedModel,
        device: torch.device,
        methods: Sequence[str] | None = None,
        target: str | None = None,
        topk: int = 5,
    ) -> None:
        methods = DEFAULT_DENSE_EXPLANATIONS.get(trained.task, ()) if methods is None else methods
        check_methods(methods, DENSE_EXPLANATIONS, trained.task)
        if topk < 1:
            raise ValueError(f"topk must be >= 1, got {topk}")
        self._answer: Callable[[Image.Image], _Answer]
        if trained.task == "segmentation":
            self._segment, self._answer = SegmentImages(trained, device), self._masks
        else:
            self._find, self._answer = ObjectFinder(trained, device), self._boxes
        assert trained.class_names is not None
        self._names = trained.class_names
        model: Any = trained.model
        self._model = model
        self._methods, self._topk = tuple(methods), topk
        self._target = None if target is None else class_number(target, self._names)
        if {"attention", "rollout"} & set(methods):
            check_vision_mamba(model.backbone.model)

    def draw(self, image: Image.Image, output: Path) -> list[tuple[str, float]]:
        """Explain an image in a PNG file.

        Args:
            image: An image of any size and mode.
            output: The file to make or replace; its folder is made where it is missing.

        Returns:
            Names of the explained classes with their shares of the pixels, or of the explained boxes with their
            scores; the highest first.

        Raises:
            NothingToExplainError: The image cannot be used, the class is predicted nowhere, or there is no box with a
                score of at least 0.5.
            OSError: The picture cannot be written.
        """
        answer = self._answer(image)
        first = [Panel("image", answer.photograph), Panel("prediction", answer.prediction)]
        rows = [first]
        titles = [f"{name} ({100 * share:.1f} %)" for name, share in answer.explained]
        for method, values in self._maps(answer).items():
            if method in _OF_THE_IMAGE:
                first.append(Panel(_OF_THE_IMAGE[method], answer.photograph, values[0]))
                continue
            shown = zip(titles, values, answer.outlines, strict=True)
            rows.append([Panel(f"{method}: {title}", answer.photograph, *own) for title, *own in shown])
        output.parent.mkdir(parents=True, exist_ok=True)
        draw_panels(rows, output)
        return answer.explained

    def _maps(self, answer: _Answer) -> dict[str, Tensor]:
        """Return the maps of each method, (classes or boxes, height, width), or (1, height, width) of the image."""
        maps = {m: self._attention(answer, m) for m in self._methods if m not in METHODS}
        if weighing := [m for m in self._methods if m in METHODS]:
            activation = answer.activation()
            maps |= {m: activation.maps(m) for m in weighing}
        return maps

    def _masks(self, image: Image.Image) -> _Answer:
        with using_image():
            pixels = self._segment.pixels(image)
        labels = self._segment.predictor.labels(pixels)
        counts = torch.bincount(labels.flatten(), minlength=len(self._names))
        present = [c for c in counts.argsort(descending=True, stable=True).tolist() if counts[c]]
        classes = [c for c in present if self._target in (None, c)][: self._topk]
        if not classes:
            raise NothingToExplainError(f"no pixel of it is predicted as {self._names[self._target or 0]!r}")
        view, windows, starts = self._segment.predictor.windows(pixels)
        shape = (view.shape[-2], view.shape[-1])
        seen = F.interpolate(labels[None, None].double(), shape)[0, 0].long()
        photograph = image_of(pixels).convert("RGB")
        return _Answer(
            photograph=_as_tensor(photograph),
            prediction=_as_tensor(overlay(photograph, labels, len(self._names))),
            explained=[(self._names[c], int(counts[c]) / labels.numel()) for c in classes],
            outlines=[labels == c for c in classes],
            windows=windows,
            starts=starts,
            shape=shape,
            activation=lambda: segment_activation(self._model, windows, starts, seen, classes),
        )

    def _boxes(self, image: Image.Image) -> _Answer:
        with using_image():
            pixels = self._find.pixels(image)
        found = self._find.find(image, _LEAST_SCORE)
        label = None if self._target is None else self._target + 1
        chosen = [i for i, own in enumerate(found["labels"].tolist()) if label in (None, own)][: self._topk]
        if not chosen:
            of = "" if self._target is None else f" of class {self._names[self._target]!r}"
            raise NothingToExplainError(f"no object{of} in it has a score of at least {_LEAST_SCORE}")
        prepared = self._find.prepare(image)
        canvas = self._model.transform([prepared])[0]
        names = [self._names[own - 1] for own in found["labels"][chosen].tolist()]
        return _Answer(
            photograph=draw_enlarged(pixels, {}, self._names),
            prediction=draw_enlarged(pixels, found, self._names),
            explained=list(zip(names, found["scores"][chosen].tolist(), strict=True)),
            outlines=[_inside(box, pixels.shape[-2:]) for box in found["boxes"][chosen].tolist()],
            windows=list(canvas.tensors),
            starts=[(0, 0)],
            shape=canvas.image_sizes[0],
            activation=lambda: box_activation(self._model, prepared, len(chosen), label, _LEAST_SCORE)[1],
        )

    def _attention(self, answer: _Answer, method: str) -> Tensor:
        """Return what all patches together take from each patch, (1, height, width)."""
        height, width = answer.windows[0].shape[-2:]
        cells = Cells((height, width), answer.starts)
        for window, start in zip(answer.windows, answer.starts, strict=True):
            layers = None if method == "rollout" else -1
            attention = hidden_attention(self._model.backbone.model, window[None], layers, absolute=True)
            matrix = attention_rollout(attention)[0] if method == "rollout" else attention.matrices[0, 0]
            patches = slice(attention.num_prefix_tokens, None)
            cells.add(start, read_out_map(matrix[patches, patches], attention.grid, 0))
        return cut_to_image(cells.mean()[None], cells.size, answer.shape)


def _as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def _inside(box: Sequence[float], shape: Sequence[int]) -> Tensor:
    """Return which pixels have their middle in a box, (height, width), bool."""
    left, top, right, bottom = box
    rows, columns = (torch.arange(length) + 0.5 for length in shape)
    return ((rows >= top) & (rows <= bottom))[:, None] & (columns >= left) & (columns <= right)
