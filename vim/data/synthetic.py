"""Random images with labels, for benchmarks and tests."""

import torch

from vim.data.tensors import TensorImages


def make_synthetic(
    num_images: int, image_shape: tuple[int, int], in_chans: int, num_classes: int, seed: int
) -> tuple[TensorImages, TensorImages]:
    """Make images that mix noise with one random pattern per class, so that a model can learn them.

    Args:
        num_images: Number of training images; a quarter as many are held out.
        image_shape: Height and width in pixels.
        in_chans: Channels of the images.
        num_classes: Number of classes.
        seed: Seed of the patterns and of the noise.

    Returns:
        The training images and the held-out images.
    """
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randint(0, 256, (num_classes, in_chans, *image_shape), generator=generator, dtype=torch.uint8)

    def draw(count: int) -> TensorImages:
        labels = torch.arange(count) % num_classes
        noise = torch.randint(0, 256, (count, in_chans, *image_shape), generator=generator, dtype=torch.uint8)
        return TensorImages(patterns[labels] // 2 + noise // 2, labels)

    return draw(num_images), draw(num_images // 4)
