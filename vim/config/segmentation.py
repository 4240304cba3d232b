"""Settings of the task `segmentation`; part of the schema."""

from dataclasses import dataclass
from typing import Literal

from vim.config.checks import check, check_choice, check_fraction, check_not_negative, check_positive, check_range

MapTap = Literal["sum", "mixer"]
MapNorm = Literal["group", "batch"]
MOST_CLASSES = 254  # labels are bytes, and 255 marks pixels without a class


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentationConfig:
    """Segmentation: the head, the masks, random crops and the evaluation; other tasks do not read them."""

    blocks: tuple[int, ...] = ()
    """The four blocks that feed the pyramid, such as `[5, 11, 17, 23]`; empty takes the last of each quarter."""
    tap: MapTap = "sum"
    """What the pyramid reads of a block: residual plus hidden state (`sum`) or the `mixer`'s output alone."""
    norm: MapNorm = "group"
    """Norms of pyramid and heads: `group` works with any batch; `batch`, the original's, is synchronised over GPUs."""
    channels: int | None = None
    """Channels of the head; `null` is the width of the model."""
    dropout: float = 0.1
    """Probability that a channel is dropped before the classifiers."""
    aux_weight: float = 0.4
    """Weight of the loss of the auxiliary head; 0 leaves the head out."""
    aux_channels: int = 256
    """Channels of the auxiliary head."""
    classes: tuple[str, ...] = ()
    """Names of the classes; empty takes the lines of `classes.txt` in `data.path`, or numbers."""
    mask_values: tuple[int, ...] = ()
    """Value of each class in the mask files, such as `[0, 255]`; empty is 0, 1, 2 and so on."""
    ignore_value: int | None = 255
    """Value of pixels without a class in the mask files: they count neither in the loss nor in the evaluation."""
    mask_suffix: str = ""
    """What the name of a mask has between the name of its image and the ending, such as `_mask`."""
    checked: int = 100
    """Pairs of each split that are checked before the run; later ones that do not fit are left out and counted."""
    scenes: int = 1000
    """Number of training scenes of the `digit_scenes` set; a quarter as many are held out, and at most 500."""
    scene_digits: int = 5
    """Most digits in a scene of `digit_scenes`."""
    scene_sides: tuple[float, float] = (0.3, 0.5)
    """Smallest and largest height of a digit of `digit_scenes`, relative to the scene."""
    scene_overlap: float = 1.0
    """Largest share of a digit's box of `digit_scenes` that the box of another digit may cover."""
    repeats: int = 1
    """Times that an image appears in an epoch, each time cropped anew, for sets of few images."""
    short_side: int | None = None
    """Shorter side that images are resized to, before crops and at evaluation; `null` keeps their size."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest factor of a random resize before the crop to `model.img_size`."""
    category_ratio: float = 0.75
    """Largest share of one class in a crop; after ten tries the last crop is taken. 1 takes the first."""
    photometric: bool = False
    """Change brightness, contrast, saturation and hue of a crop at random."""
    stride: int | None = None
    """Step in pixels between windows of `model.img_size` at evaluation; `null` is two thirds of a window."""
    test_scales: tuple[float, ...] = (1.0,)
    """Factors of the image size at evaluation, whose probabilities are averaged."""
    test_flip: bool = False
    """Average the probabilities with the ones of the mirrored image at evaluation."""

    def __post_init__(self) -> None:
        check("segmentation.blocks", self.blocks, "four blocks or none", lambda v: len(v) in (0, 4))
        check_choice("segmentation.tap", self.tap, MapTap)
        check_choice("segmentation.norm", self.norm, MapNorm)
        for name in ("channels", "short_side", "stride"):
            if getattr(self, name) is not None:
                check_positive(f"segmentation.{name}", getattr(self, name))
        for name in ("aux_channels", "scenes", "scene_digits", "repeats"):
            check_positive(f"segmentation.{name}", getattr(self, name))
        for name in ("aux_weight", "checked"):
            check_not_negative(f"segmentation.{name}", getattr(self, name))
        check_fraction("segmentation.dropout", self.dropout)
        check_fraction("segmentation.category_ratio", self.category_ratio)
        check_fraction("segmentation.scene_overlap", self.scene_overlap)
        check_range("segmentation.scale", self.scale)
        rise = "two numbers that rise, from 0.1 to 1"
        check("segmentation.scene_sides", self.scene_sides, rise, lambda v: 0.1 <= v[0] <= v[1] <= 1)
        check(
            "segmentation.test_scales",
            self.test_scales,
            "at least one number, each > 0",
            lambda v: len(v) > 0 and all(factor > 0 for factor in v),
        )
        self._check_classes()

    def _check_classes(self) -> None:
        values, names = self.mask_values, self.classes
        for setting, chosen in (("classes", names), ("mask_values", values)):
            rule = f"at most {MOST_CLASSES} different ones, and not a single one"
            check(
                f"segmentation.{setting}",
                chosen,
                rule,
                lambda v: len(v) != 1 and len(set(v)) == len(v) <= MOST_CLASSES,
            )
        in_file = "from 0 to 65535"
        check("segmentation.mask_values", values, in_file, lambda v: all(0 <= value < 2**16 for value in v))
        if self.ignore_value is not None:
            check("segmentation.ignore_value", self.ignore_value, in_file, lambda v: 0 <= v < 2**16)
        if values and names and len(values) != len(names):
            raise ValueError(
                f"segmentation.mask_values must have a value for each of {len(names)} classes, got {len(values)}"
            )
        if self.ignore_value in values:
            raise ValueError(
                f"segmentation.ignore_value must be null or none of segmentation.mask_values, got {self.ignore_value}"
            )
