"""Settings of detection and instance segmentation; part of the schema."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from vim.config.checks import check, check_choice, check_fraction, check_positive, check_range

_COUNTS = ("channels", "anchor_samples", "proposals", "box_samples", "head_features", "max_detections", "scenes")
DetectorHeads = Literal["mask_rcnn", "cascade"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectionConfig:
    """Detection: pyramid, heads and augmentation; only with `task: detection`."""

    heads: DetectorHeads = "mask_rcnn"
    """`mask_rcnn` (one box head) or `cascade` (three in a row, at IoU 0.5, 0.6 and 0.7)."""
    masks: bool = True
    """Predict a mask of each object; without masks the same heads are Faster R-CNN and Cascade R-CNN."""
    scales: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5)
    """Scales of the pyramid's levels relative to the backbone's map; a last level at half the coarsest is added."""
    channels: int = 256
    """Channels of pyramid and heads."""
    anchor_scale: float = 8.0
    """Side of the anchors of a level, relative to the pixels per cell."""
    anchor_samples: int = 256
    """Anchors of an image that the loss of the proposals samples."""
    proposals: int = 1000
    """Proposals of an image for the box heads."""
    box_samples: int = 512
    """Proposals of an image that the loss of the box heads samples."""
    head_convolutions: int = 4
    """Convolutions of each box head, and of the mask head."""
    head_features: int = 1024
    """Features of the linear layer of each box head."""
    score_threshold: float = 0.05
    """Detections with a lower score are dropped."""
    max_detections: int = 100
    """Detections of an image to keep, the ones with the highest scores."""
    scenes: int = 1000
    """Number of training scenes of the `digit_scenes` set; a quarter as many are held out."""
    jitter: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest scale of a training image, relative to the size at which it fits the input; the image is
    then cropped or padded to the input (large-scale jitter)."""

    def __post_init__(self) -> None:
        check_choice("detection.heads", self.heads, DetectorHeads)
        rule = "powers of two that halve from level to level, such as [4, 2, 1, 0.5]"
        check("detection.scales", self.scales, rule, lambda v: len(v) > 0 and all(_is_power_of_two(x) for x in v))
        check("detection.scales", self.scales, rule, lambda v: all(a == 2 * b for a, b in pairwise(v)))
        for name in (*_COUNTS, "anchor_scale"):
            check_positive(f"detection.{name}", getattr(self, name))
        check("detection.head_convolutions", self.head_convolutions, ">= 0", lambda v: v >= 0)
        check_fraction("detection.score_threshold", self.score_threshold)
        check_range("detection.jitter", self.jitter)


def _is_power_of_two(value: float) -> bool:
    return value > 0 and max(value, 1 / value).is_integer() and max(value, 1 / value) in (1, 2, 4, 8, 16, 32)
