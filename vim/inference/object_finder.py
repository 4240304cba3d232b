"""Find the objects in image files with a trained detector; the library side of `python -m vim.predict`."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from vim.checkpoints.io import atomic_writer, write_text
from vim.data.decoding import BAD_IMAGE, describe_bad_image, read_image, to_color_mode, upright
from vim.data.listing import with_output_names
from vim.inference.detection_pictures import confident, draw_objects
from vim.inference.trained_model import TrainedModel


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FoundObjects:
    """The objects that were found in an image, or the error that prevented it."""

    path: Path
    picture: Path | None = None
    """PNG file with boxes and masks over the image."""
    objects: tuple[tuple[str, float], ...] = ()
    """Class and score of each object, the highest score first."""
    error: str | None = None
    """Reason why the file could not be read."""


class ObjectFinder:
    """A trained detector that takes images of any size.

    Args:
        trained: The model, from `load_trained_model`.
        device: Device to run it on.

    Raises:
        ValueError: The model is of another task.
    """

    def __init__(self, trained: TrainedModel, device: torch.device) -> None:
        trained.check_task("detection")
        assert trained.class_names is not None
        self.class_names = trained.class_names
        self.model, self._device = trained.model.eval().to(device), device
        self._preprocessing = trained.preprocessing

    @torch.inference_mode()
    def find(self, image: Image.Image, score: float = 0.5) -> dict[str, Tensor]:
        """Return the objects in an image, after making it upright.

        Args:
            image: The image.
            score: Objects with a lower score are left out.

        Returns:
            `boxes` (n, 4), `labels` (n,) from 1, `scores` (n,), and `masks` (n, height, width), bool, if the model
            predicts them; on the CPU, the highest score first.
        """
        found = self.model([self.prepare(image)])[0]
        return {name: tensor.cpu() for name, tensor in confident(found, score).items()}

    def write_files(self, paths: Sequence[Path], folder: Path, score: float = 0.5) -> Iterator[FoundObjects]:
        """Find the objects in image files, and write `NAME_objects.png` and `NAME_objects.json` for each into a folder.

        The JSON file has a list in COCO's format of results, with the name of the class.

        Args:
            paths: The images. Of two with the same name, the later one gets a number.
            folder: The folder, created if it does not exist.
            score: Objects with a lower score are left out.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for path, stem in with_output_names(paths):
            try:
                image = read_image(path)
                found = self.find(image, score)
            except BAD_IMAGE as error:
                yield FoundObjects(path=path, error=describe_bad_image(error))
                continue
            picture = draw_objects(self.pixels(image), found, self.class_names)
            with atomic_writer(folder / f"{stem}_objects.png") as file:
                Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, format="PNG")
            write_text(folder / f"{stem}_objects.json", json.dumps(self._results(found)) + "\n")
            names = [self.class_names[label - 1] for label in found["labels"].tolist()]
            objects = tuple(zip(names, found["scores"].tolist(), strict=True))
            yield FoundObjects(path=path, picture=folder / f"{stem}_objects.png", objects=objects)

    def prepare(self, image: Image.Image) -> Tensor:
        """Return what the model gets of an image, (in_chans, height, width), from 0 to 1, on the model's device."""
        return self.pixels(image).to(self._device).float() / 255

    def pixels(self, image: Image.Image) -> Tensor:
        """Return the pixels of an image, upright and in the model's channels, (in_chans, height, width), uint8."""
        return pil_to_tensor(to_color_mode(upright(image), self._preprocessing.color_mode, self._preprocessing.bits))

    def _results(self, found: dict[str, Tensor]) -> list[dict[str, Any]]:
        results = []
        for index, (left, top, right, bottom) in enumerate(found["boxes"].tolist()):
            label = int(found["labels"][index])
            result: dict[str, Any] = {
                "category": self.class_names[label - 1],
                "score": float(found["scores"][index]),
                "bbox": [left, top, right - left, bottom - top],
            }
            if "masks" in found:
                result["segmentation"] = _run_lengths(found["masks"][index])
            results.append(result)
        return results


def _run_lengths(mask: Tensor) -> dict[str, Any]:
    """Return a mask, (height, width), as COCO's run lengths in text."""
    from faster_coco_eval.core import mask as coco

    runs = coco.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"size": list(mask.shape), "counts": runs["counts"].decode()}
