"""Explain the answers of a trained model image by image: what `python -m vim.explain` runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vim.explain.attention import HiddenAttention, attention_rollout, hidden_attention, read_out_map
from vim.explain.checks import check_methods, check_vision_mamba, class_number, using_image
from vim.explain.class_activation import class_activation
from vim.explain.names import DEFAULT_EXPLANATIONS, EXPLANATIONS, METHODS, PIXEL_METHODS
from vim.explain.pictures import draw_explanation
from vim.explain.pixel_gradients import pixel_gradients
from vim.inference.predictor import Predictor

_TITLES = {
    "attention": "attention of the read-out",
    "rollout": "attention through all layers",
    "integrated_gradients": "integrated gradients",
}


class Explainer:
    """A trained model with the explanations to draw of its answers.

    Args:
        predictor: The model with its preprocessing and class names.
        methods: Names from `EXPLANATIONS`.
        target: Name or number of the class to explain; `None` is the likeliest of each image.
        topk: Number of classes to name.

    Raises:
        TypeError: A method needs a VisionMamba, and the model is another one.
        ValueError: A method or the class is unknown, or `topk` is less than 1.
    """

    def __init__(
        self,
        predictor: Predictor,
        methods: Sequence[str] = DEFAULT_EXPLANATIONS,
        target: str | None = None,
        topk: int = 5,
    ) -> None:
        check_methods(methods, EXPLANATIONS, "classification")
        if topk < 1:
            raise ValueError(f"topk must be >= 1, got {topk}")
        if any(method not in PIXEL_METHODS for method in methods):
            check_vision_mamba(predictor.model)
        self._predictor, self._methods = predictor, tuple(methods)
        self._topk = min(topk, len(predictor.class_names))
        self._target = None if target is None else class_number(target, predictor.class_names)

    def draw(self, image: Image.Image, output: Path) -> list[tuple[str, float]]:
        """Explain an image in a PNG file.

        Args:
            image: An image of any size and mode.
            output: The file to make or replace; its folder is made where it is missing.

        Returns:
            Names of the likeliest classes with their probabilities.

        Raises:
            NothingToExplainError: The image cannot be used: its pixels are 32-bit numbers, or its file is damaged.
            OSError: The picture cannot be written.
        """
        predictor = self._predictor
        with using_image():
            pixels = predictor.preprocess(image)[None]
        with torch.no_grad():
            probabilities = predictor.model(pixels)[0].float().softmax(0)
        values, classes = probabilities.topk(self._topk)
        guesses = [(predictor.class_names[c], v) for c, v in zip(classes.tolist(), values.tolist(), strict=True)]
        target = int(classes[0]) if self._target is None else self._target
        output.parent.mkdir(parents=True, exist_ok=True)
        draw_explanation(predictor.preprocessing.as_photograph(pixels[0]), self._maps(pixels, target), guesses, output)
        return guesses

    def _maps(self, pixels: Tensor, target: int) -> list[tuple[str, Tensor]]:
        model, name = self._predictor.model, self._predictor.class_names[target]
        attention: HiddenAttention | None = None
        if {"attention", "rollout"} & set(self._methods):
            attention = hidden_attention(model, pixels, absolute=True)
        explain: dict[str, Callable[[], Tensor]] = {}
        if attention is not None:
            explain["attention"] = lambda: attention.maps()[-1, 0]
            explain["rollout"] = lambda: read_out_map(
                attention_rollout(attention), attention.grid, attention.num_prefix_tokens
            )[0]
        maps = []
        for method in self._methods:
            if method in explain:
                values = explain[method]()
            elif method in METHODS:
                values = class_activation(model, pixels, target, method)[0]
            else:
                how: Any = method
                values = pixel_gradients(model, pixels, target, how)[0]
            of_class = "" if method in ("attention", "rollout") else f": {name}"
            maps.append((_TITLES.get(method, method) + of_class, values))
        return maps
