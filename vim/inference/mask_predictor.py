"""Scores and labels for each pixel of an image of any size."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from vim.config.schema import TrainConfig
from vim.data.joint_transforms import resized_shape
from vim.data.preprocessing import Preprocessing
from vim.inference.sliding import pad_to_window, slide, window_starts

ScoreRows = Iterator[tuple[int, Tensor]]
"""The first row, and logits (classes, rows, width), from top to bottom."""


class MaskPredictor:
    """A segmentation model with its preprocessing: windows, scales and flips as the settings say.

    Args:
        model: Maps images (batch, in_chans, height, width) to logits of the same size; in evaluation mode.
        config: The settings of the run.
        device: Device of the model.
        autocast: Returns the context to run the model in.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._model, self._device, self._autocast = model, device, autocast
        preprocessing, own = Preprocessing.from_config(config), config.segmentation
        self._mean, self._std = (
            torch.tensor(values, device=device)[:, None, None] * 255
            for values in (preprocessing.mean, preprocessing.std)
        )
        self._window = config.model.image_shape
        step = own.stride
        height, width = (max(1, side * 2 // 3) if step is None else min(step, side) for side in self._window)
        self._stride = height, width
        self._short_side, self._scales, self._flip = own.short_side, own.test_scales, own.test_flip
        self._batch = config.eval_batch_size or config.micro_batch_size

    def scores(self, images: Sequence[Tensor]) -> Iterator[ScoreRows]:
        """Yield the rows of logits of each image; every row must be taken before the next image.

        Args:
            images: (in_chans, height, width) each, uint8, of any sizes.
        """
        if self._is_plain and all(image.shape[-2:] == self._window for image in images):
            if images:
                for logits in self._run(self._normalised(torch.stack(list(images)))).float():
                    yield iter([(0, logits)])
            return
        for image in images:
            yield self._rows(image)

    def labels(self, image: Tensor) -> Tensor:
        """Return the most likely label of each pixel, (height, width), int64, on the CPU.

        Args:
            image: (in_chans, height, width), uint8.
        """
        rows = next(self.scores([image]))
        return torch.cat([logits.argmax(dim=0).cpu() for _, logits in rows])

    def windows(self, image: Tensor) -> tuple[Tensor, list[Tensor], list[tuple[int, int]]]:
        """Return what the model gets of an image at scale 1, unflipped.

        Args:
            image: (in_chans, height, width), uint8.

        Returns:
            The normalised image, resized by `segmentation.short_side` alone, (in_chans, height, width); its windows,
            padded with zeros where it is smaller; and the first row and column of each window.
        """
        shape = resized_shape((image.shape[-2], image.shape[-1]), self._short_side, 1.0)
        view = self._normalised(functional.resize(image, list(shape)))
        padded = pad_to_window(view, self._window)
        tops, lefts = window_starts(padded, self._window, self._stride)
        starts = [(top, left) for top in tops for left in lefts]
        height, width = self._window
        return view, [padded[:, top : top + height, left : left + width] for top, left in starts], starts

    @property
    def _is_plain(self) -> bool:
        return self._short_side is None and self._scales == (1.0,) and not self._flip

    def _rows(self, image: Tensor) -> ScoreRows:
        if self._is_plain:
            yield from self._slide(self._normalised(image))
            return
        # Logits of a resized image are resized back, and logits of several views averaged, over the whole image.
        shape = (image.shape[-2], image.shape[-1])
        views = len(self._scales) * (2 if self._flip else 1)
        total: Tensor | None = None
        for factor in self._scales:
            resized = functional.resize(image, list(resized_shape(shape, self._short_side, factor)))
            for flipped in (False, True) if self._flip else (False,):
                view = self._normalised(resized.flip(-1) if flipped else resized)
                logits = torch.cat([rows for _, rows in self._slide(view)], dim=1)
                logits = logits.flip(-1) if flipped else logits
                logits = F.interpolate(logits[None], shape, mode="bilinear", align_corners=False)[0]
                if views == 1:
                    yield 0, logits
                    return
                probabilities = logits.softmax(dim=0)
                total = probabilities if total is None else total + probabilities
        assert total is not None
        yield 0, (total / views).log()

    def _slide(self, image: Tensor) -> ScoreRows:
        return slide(self._run, image, self._window, self._stride, self._batch)

    def _normalised(self, pixels: Tensor) -> Tensor:
        return (pixels.to(self._device, torch.float32) - self._mean) / self._std

    @torch.inference_mode()
    def _run(self, windows: Tensor) -> Tensor:
        with self._autocast():
            return self._model(windows)
