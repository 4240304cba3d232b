"""Segment image files with a trained model; the library side of `python -m vim.predict`."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vim.checkpoints.io import atomic_writer
from vim.data.decoding import BAD_IMAGE, describe_bad_image, read_image, to_color_mode, upright
from vim.data.listing import with_output_names
from vim.data.preprocessing import Preprocessing
from vim.inference.mask_pictures import mask_image, overlay
from vim.inference.mask_predictor import MaskPredictor
from vim.inference.trained_model import TrainedModel


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Segmentation:
    """The mask that was written for an image, or the error that prevented it."""

    path: Path
    mask: Path | None = None
    """PNG file whose pixels are labels, with a palette."""
    shares: tuple[tuple[str, float], ...] = ()
    """Names of the classes in the mask with their shares of the pixels, the largest first."""
    error: str | None = None
    """Reason why the file could not be read."""


class SegmentImages:
    """A trained segmentation model that takes images of any size.

    Args:
        trained: The model, from `load_trained_model`.
        device: Device to run it on.

    Raises:
        ValueError: The model is of another task.
    """

    def __init__(self, trained: TrainedModel, device: torch.device) -> None:
        trained.check_task("segmentation")
        assert trained.config is not None
        assert trained.class_names is not None
        self.class_names = trained.class_names
        self.predictor = MaskPredictor(trained.model.eval().to(device), trained.config, device)
        self._preprocessing: Preprocessing = trained.preprocessing

    def labels(self, image: Image.Image) -> Tensor:
        """Return the label of each pixel of an image, (height, width), int64, after making it upright."""
        return self.predictor.labels(self.pixels(image))

    def pixels(self, image: Image.Image) -> Tensor:
        """Return the pixels of an image, upright and in the model's channels, (in_chans, height, width), uint8."""
        prepared = to_color_mode(upright(image), self._preprocessing.color_mode, self._preprocessing.bits)
        return torch.from_numpy(np.atleast_3d(np.asarray(prepared)).transpose(2, 0, 1).copy())

    def write_files(self, paths: Sequence[Path], folder: Path) -> Iterator[Segmentation]:
        """Segment image files, and write `NAME_mask.png` and `NAME_overlay.png` for each into a folder.

        Args:
            paths: The images. Of two with the same name, the later one gets a number.
            folder: The folder, created if it does not exist.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for path, stem in with_output_names(paths):
            try:
                image = read_image(path)
                labels = self.labels(image)
            except BAD_IMAGE as error:
                yield Segmentation(path=path, error=describe_bad_image(error))
                continue
            number = len(self.class_names)
            with atomic_writer(folder / f"{stem}_mask.png") as file:
                mask_image(labels, number).save(file, format="PNG")
            with atomic_writer(folder / f"{stem}_overlay.png") as file:
                overlay(image, labels, number).save(file, format="PNG")
            yield Segmentation(path=path, mask=folder / f"{stem}_mask.png", shares=self.shares(labels))

    def shares(self, labels: Tensor) -> tuple[tuple[str, float], ...]:
        """Return the names of the classes among labels with their shares of the pixels, the largest first."""
        counts = torch.bincount(labels.flatten(), minlength=len(self.class_names))
        order = [label for label in counts.argsort(descending=True).tolist() if counts[label]]
        return tuple((self.class_names[label], int(counts[label]) / labels.numel()) for label in order)
