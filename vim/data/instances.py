"""Images with objects: the annotation of an image, and the sources that the loaders read."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from PIL import Image
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Instances:
    """The objects in an image."""

    boxes: Tensor
    """Left, top, right and bottom in pixels, (objects, 4), float32."""
    labels: Tensor
    """Class of each object, (objects,), int64; from 1, since the detectors of torchvision keep 0 for the background."""
    masks: Tensor
    """Pixels of each object, (objects, height, width), bool."""
    crowd: Tensor
    """True where a mask covers a group of objects, (objects,), bool."""
    area: Tensor
    """Area of each object in pixels, by which COCO sorts objects into small, medium and large; (objects,), float32."""

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, keep: Tensor) -> "Instances":
        """Return the objects where `keep`, (objects,), bool, is true."""
        return Instances(**{field.name: getattr(self, field.name)[keep] for field in dataclasses.fields(self)})


class InstanceSource(Protocol):
    """Images of a split with their objects."""

    class_names: tuple[str, ...]
    """Name of each class; the first one has the label 1."""
    checksum: int
    """A number that changes with the annotations."""

    @property
    def notes(self) -> Sequence[str]:
        """What is unusual about the annotations, in words."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, Instances]:
        """Return an image, decoded and upright, and its objects.

        Raises:
            BAD_IMAGE: The image or its annotation cannot be read.
        """
        ...

    def name(self, index: int) -> str:
        """Return the name of an image, for messages."""
        ...

    def keys(self) -> Sequence[str]:
        """Return a name for each image that does not change when the data moves."""
        ...
