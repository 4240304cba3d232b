"""From images of any size to the input of a detector, and from its boxes and masks back to the images."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes


class FitTransform(GeneralizedRCNNTransform):
    """Normalise images, resize them to fit the input of the model, and pad them at the right and at the bottom.

    torchvision pads a batch to its largest image. Here every image has the same canvas: the model reads the padding as
    a part of the sequence, so that a result would depend on the other images of a batch.

    Args:
        image_shape: Height and width of the input in pixels.
        mean, std: Of each channel, for pixels between 0 and 1.
    """

    def __init__(self, image_shape: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(min(image_shape), max(image_shape), list(mean), list(std))
        self.image_shape = image_shape

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Resize an image (channels, height, width) with its boxes and masks, so that it just fits the input."""
        before = (image.shape[-2], image.shape[-1])
        scale = min(length / own for length, own in zip(self.image_shape, before, strict=True))
        rows, columns = (max(1, round(own * scale)) for own in before)
        if (rows, columns) == before:
            return image, target
        image = F.interpolate(image[None], (rows, columns), mode="bilinear", antialias=True)[0]
        if target is not None:
            target["boxes"] = resize_boxes(target["boxes"], list(before), [rows, columns])
            if "masks" in target:
                masks = target["masks"][:, None].float()
                target["masks"] = F.interpolate(masks, (rows, columns))[:, 0].byte()
        return image, target

    def batch_images(self, images: list[Tensor], size_divisible: int = 1) -> Tensor:
        """Return the images on canvases of the input's size, (batch, channels, height, width)."""
        batch = images[0].new_zeros(len(images), images[0].shape[0], *self.image_shape)
        for canvas, image in zip(batch, images, strict=True):
            canvas[:, : image.shape[1], : image.shape[2]].copy_(image)
        return batch
