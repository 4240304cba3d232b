"""Augmentation of images together with their boxes and masks: flip and large-scale jitter."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from vim.data.instances import Instances

Target = dict[str, Tensor]


class InstanceTransform:
    """Flip, scale, and crop or pad an image with its objects to the size of the input.

    It draws from the global random generators.

    Objects of which nothing is left are dropped, and so are crowds, which are not single objects. With masks, a box is
    computed anew from the visible part of its object.

    Args:
        image_shape: Height and width of the input in pixels.
        jitter: Smallest and largest scale, relative to the size at which an image just fits the input.
        hflip: Probability of a left-right flip.
        fill: Value of the padding for each channel, 0 to 255.
        masks: Return the masks too.

    Source: Ghiasi et al. 2021, arXiv:2012.07177, section 3, for large-scale jitter.
    """

    def __init__(
        self,
        image_shape: tuple[int, int],
        *,
        jitter: tuple[float, float] = (0.1, 2.0),
        hflip: float = 0.5,
        fill: Sequence[float] = (0.0,),
        masks: bool = True,
    ) -> None:
        self._masks = masks
        self._transform = v2.Compose(
            [v2.RandomHorizontalFlip(hflip), ScaleToFit(image_shape, jitter), CropOrPad(image_shape, fill)]
        )

    def __call__(self, image: Image.Image, instances: Instances) -> tuple[Tensor, Target]:
        """Return (channels, height, width), uint8, and `boxes`, `labels` and `masks` of the objects."""
        objects = instances.select(~instances.crowd)
        sample: dict[str, Any] = {
            "image": tv_tensors.Image(F.pil_to_tensor(image)),
            "boxes": tv_tensors.BoundingBoxes(objects.boxes, format="XYXY", canvas_size=(image.height, image.width)),
        }
        if self._masks:
            sample["masks"] = tv_tensors.Mask(objects.masks)
        sample = self._transform(sample)
        boxes, target = sample["boxes"].as_subclass(Tensor), {"labels": objects.labels}
        if self._masks:
            masks = sample["masks"].as_subclass(Tensor)
            boxes = masks_to_boxes(masks)
            boxes[:, 2:] += 1  # from the last pixel to the edge behind it
            target["masks"] = masks
            visible = masks.flatten(1).any(dim=1)
        else:
            visible = (boxes[:, 2:] - boxes[:, :2] >= 1).all(dim=1)
        target["boxes"] = boxes
        image_tensor = sample["image"].as_subclass(Tensor)
        return image_tensor, {name: value[visible] for name, value in target.items()}


class ScaleToFit(v2.ScaleJitter):
    """Resize an image to a random multiple of the size at which it just fits the input; at least one pixel remains.

    `v2.ScaleJitter` takes the height for the width, and makes images without pixels.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the size."""
        before = v2.query_size(flat_inputs)
        low, high = self.scale_range
        fit = min(length / own for length, own in zip(self.target_size, before, strict=True))
        scale = fit * (low + (high - low) * torch.rand(()).item())
        return {"size": [max(1, round(own * scale)) for own in before]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize an image, boxes or masks."""
        if isinstance(inpt, tv_tensors.Mask):  # torchvision's "nearest" shifts masks by half a pixel when it reduces
            resized = F.resize_image(inpt.as_subclass(Tensor), params["size"], v2.InterpolationMode.NEAREST_EXACT)
            return tv_tensors.wrap(resized, like=inpt)
        return super().transform(inpt, params)


class CropOrPad(v2.Transform):
    """Crop a random part of the size of the input, and pad smaller images at the right and at the bottom.

    Args:
        image_shape: Height and width of the input in pixels.
        fill: Value of the padding of an image for each channel; masks are padded with zeros.
    """

    def __init__(self, image_shape: tuple[int, int], fill: Sequence[float]) -> None:
        super().__init__()
        self._shape, self._fill = image_shape, list(fill)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the place of the crop."""
        excess = [max(0, own - length) for own, length in zip(v2.query_size(flat_inputs), self._shape, strict=True)]
        top, left = (int(torch.randint(most + 1, ())) for most in excess)
        return {"top": top, "left": left}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop and pad an image, boxes or masks."""
        height, width = v2.query_size([inpt])
        rows, columns = min(height, self._shape[0]), min(width, self._shape[1])
        cropped = self._call_kernel(F.crop, inpt, params["top"], params["left"], rows, columns)
        padding = [0, 0, self._shape[1] - columns, self._shape[0] - rows]
        fill = self._fill if isinstance(inpt, tv_tensors.Image) else 0
        return self._call_kernel(F.pad, cropped, padding, fill=fill)
