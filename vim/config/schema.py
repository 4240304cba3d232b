"""Every setting of a training run, as frozen dataclasses; the defaults are the `digits` recipe.

Settings are checked when an instance is made. A value out of range is a `ValueError` that names the value and the
setting as on the command line (`optim.lr`). The docstring under a field is its help text on the command line.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from vim.config.checks import (
    check,
    check_choice,
    check_finite,
    check_fraction,
    check_not_negative,
    check_positive,
    check_range,
)
from vim.config.detection import DetectionConfig
from vim.config.run import DistillConfig, LogConfig, ProgressiveConfig, SaveConfig
from vim.config.segmentation import SegmentationConfig

Precision = Literal["float32", "tf32", "bfloat16", "float16"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
EraseMode = Literal["const", "rand", "pixel"]
MixMode = Literal["batch", "pair", "elem"]
ScheduleName = Literal["cosine", "poly", "multistep", "constant"]
ScheduleUnit = Literal["epoch", "step"]
StartingWeights = Literal["best", "raw", "ema"]
Resampling = Literal["exact", "reference"]
ClipMode = Literal["norm", "value", "agc"]
LayerDecayOf = Literal["blocks", "stem"]
BestBy = Literal["raw", "ema", "better"]
TaskName = Literal["classification", "segmentation", "detection"]

# Endings of the formats that Pillow reads without further packages.
IMAGE_EXTENSIONS = (
    *(".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm"),
    *(".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Model: arguments of `timm.create_model`."""

    name: str = "vim_tiny_patch16_224"
    """A model that timm knows, such as `vim_tiny_patch16_224`."""
    img_size: int | tuple[int, int] = 32
    """Side of the square input in pixels, or `[height, width]`."""
    in_chans: int = 1
    """Channels of the input: 1 for grey, 3 for colour."""
    num_classes: int | None = None
    """Number of classes; `null` takes the number in the data."""
    drop_rate: float = 0.0
    """Dropout before the classifier."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the last block; earlier blocks get less."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    pretrained: bool = False
    """Start from the published weights of `model.name`, unless `model.checkpoint` names others."""
    checkpoint: str | None = None
    """Start from the weights in this run folder or file (`.safetensors`, or `.pth` of this library or the original)."""
    pretrained_weights: StartingWeights = "best"
    """Weights to start from: `raw`, `ema` (their average) or `best`. In a run of this library `best` is the better of
    both on held-out images; in other files it is `raw`."""
    pretrained_resampling: Resampling = "exact"
    """How to resample the position embedding to another grid: `exact`, or `reference`. The latter repeats the
    original's fine-tuning, which shifts the patches before the middle class token by one."""
    args: dict[str, Any] = field(
        default_factory=lambda: {"patch_size": 8, "embed_dim": 64, "depth": 4},
    )
    """Further arguments of the model, such as `{depth: 12}`; set a single one with `--model.args.depth 12`. A dict,
    `--model.args '{depth: 12}'`, replaces all of the recipe's, and a warning names what it drops."""

    def __post_init__(self) -> None:
        check("model.name", self.name, "the name of a timm model", bool)
        check("model.img_size", self.img_size, "a size > 0 or two of them", lambda _: min(self.image_shape) > 0)
        check_positive("model.in_chans", self.in_chans)
        if self.num_classes is not None:
            check_positive("model.num_classes", self.num_classes)
        check_fraction("model.drop_rate", self.drop_rate)
        check_fraction("model.drop_path_rate", self.drop_path_rate)
        check_choice("model.pretrained_weights", self.pretrained_weights, StartingWeights)
        check_choice("model.pretrained_resampling", self.pretrained_resampling, Resampling)
        settings = {"checkpoint_path": "checkpoint"}
        settings |= {n: n for n in ("img_size", "in_chans", "num_classes", "drop_rate", "drop_path_rate", "pretrained")}
        own = settings.keys() & set(self.args)
        if own:
            name = min(own)
            raise ValueError(
                f"model.args must not hold {name!r}: set model.{settings[name]} instead, got {self.args[name]!r}"
            )

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the input in pixels."""
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Data: the data set, and the preprocessing at evaluation."""

    dataset: str = "digits"
    """For classification `digits` (comes with scikit-learn), `fashion_mnist` (Debian's package), `synthetic` (random
    images), `folder` (one folder or tar file per split, with one folder per class), `wds/` (WebDataset shards), or a
    data set of torchvision or Hugging Face, such as `torch/cifar10` and `hfds/NAME`. For segmentation `pairs` (folders
    of images and masks), `ade20k`, `voc` and `cityscapes` (their folders), `hfds/NAME` or `nuclei` (comes with
    stardist); for detection `coco` (a folder in COCO's format); for both `digit_scenes` (scenes of scikit-learn's
    digits)."""
    path: str | None = None
    """Folder of the images; for `folder`, a folder with one sub-folder per split."""
    extensions: tuple[str, ...] = IMAGE_EXTENSIONS
    """Endings of image files, in either case; other files are ignored, and counted at the start."""
    download: bool = False
    """Download a data set of torchvision or Hugging Face, or `voc`, if it is missing."""
    input_key: str | None = None
    """Column of the images in a data set of Hugging Face; `null` is `image`."""
    target_key: str | None = None
    """Column of the labels in a data set of Hugging Face, or of the masks; `null` is `label`, or `annotation`."""
    train_split: str = "train"
    """Name of the training split."""
    val_split: str = "val"
    """Name of the held-out split."""
    crop_pct: float = 1.0
    """Side of the centre crop at evaluation, relative to the side of the resized image."""
    interpolation: Interpolation = "bicubic"
    """Resampling at evaluation."""
    mean: tuple[float, ...] = (0.309,)
    """Mean of the channels, for pixels between 0 and 1; one value, or one per channel."""
    std: tuple[float, ...] = (0.35,)
    """Standard deviation of the channels, for pixels between 0 and 1; one value, or one per channel."""
    bits: int = 16
    """Bits in use of a 16-bit grey image, such as 12; the upper 8 of them are kept."""
    workers: int = 0
    """Processes that read images; 0 reads in the training process."""
    pin_memory: bool = False
    """Read into page-locked memory, for faster copies to a GPU."""
    synthetic_images: int = 512
    """Number of training images of the `synthetic` set; a quarter as many are held out."""

    def __post_init__(self) -> None:
        check("data.dataset", self.dataset, "the name of a data set", bool)
        if self.dataset in ("folder", "pairs", "ade20k", "voc", "cityscapes", "coco") and not self.path:
            raise ValueError(
                f"data.path must name the image folder when data.dataset is {self.dataset!r}, got {self.path!r}"
            )
        if self.dataset.lower().startswith("wds/") and not self.path:
            raise ValueError(
                f"data.path must name the folder of shards when data.dataset is {self.dataset!r}, got {self.path!r}"
            )
        if self.dataset in ("digits", "digit_scenes", "nuclei", "synthetic") and self.path:
            raise ValueError(
                f"data.path must be null when data.dataset is {self.dataset!r}, which does not read files, got "
                f"{self.path!r}: for a folder of images add --data.dataset folder"
            )
        check(
            "data.extensions",
            self.extensions,
            "at least one ending with its dot, such as '.jpg'",
            lambda v: len(v) > 0 and all(len(ending) > 1 and ending.startswith(".") for ending in v),
        )
        check("data.bits", self.bits, "from 8 to 16", lambda v: 8 <= v <= 16)
        check("data.crop_pct", self.crop_pct, "> 0 and <= 1", lambda v: 0 < v <= 1)
        check_choice("data.interpolation", self.interpolation, Interpolation)
        check("data.mean", self.mean, "at least one number", lambda v: len(v) > 0)
        check("data.std", self.std, "at least one number, each > 0", lambda v: len(v) > 0 and all(s > 0 for s in v))
        check_finite("data.mean", self.mean)
        check_finite("data.std", self.std)
        check_not_negative("data.workers", self.workers)
        check("data.synthetic_images", self.synthetic_images, ">= 4", lambda v: v >= 4)


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Augmentation of the training images."""

    scale: tuple[float, float] = (0.7, 1.0)
    """Smallest and largest area of a random crop, relative to the image."""
    ratio: tuple[float, float] = (0.8, 1.25)
    """Smallest and largest aspect ratio of a random crop."""
    interpolation: Interpolation = "bilinear"
    """Resampling of a random crop."""
    hflip: float = 0.0
    """Probability of a left-right flip."""
    vflip: float = 0.0
    """Probability of an up-down flip."""
    color_jitter: float | None = None
    """Strength of colour jitter; timm ignores it when `augment.auto_augment` is on."""
    auto_augment: str | None = None
    """A policy of timm, such as `rand-m9-mstd0.5-inc1`."""
    repeats: int = 0
    """Repeated augmentation: each image appears this often in an epoch of the same length; 0 or 1 turns it off."""
    repeats_rounding: int | None = None
    """With repeated augmentation, truncate an epoch to a multiple of this; the original uses 256."""
    erase_prob: float = 0.0
    """Probability of erasing a random rectangle."""
    erase_mode: EraseMode = "pixel"
    """Fill of an erased rectangle: `const` (zero), `rand` (one random colour) or `pixel` (noise)."""
    erase_count: int = 1
    """Largest number of rectangles to erase in an image."""
    mixup: float = 0.0
    """Alpha of mixup; 0 turns it off."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0 turns it off."""
    mix_prob: float = 1.0
    """Probability of mixing a batch, when mixup or CutMix is on."""
    mix_switch_prob: float = 0.5
    """Probability of CutMix rather than mixup, when both are on."""
    mix_mode: MixMode = "batch"
    """Draw the mixing weight once per `batch`, `pair` or image (`elem`)."""

    def __post_init__(self) -> None:
        check_range("augment.scale", self.scale, upper=1.0)
        check_range("augment.ratio", self.ratio)
        check_choice("augment.interpolation", self.interpolation, Interpolation)
        for name in ("hflip", "vflip", "erase_prob", "mix_prob", "mix_switch_prob"):
            check_fraction(f"augment.{name}", getattr(self, name))
        for name in ("repeats", "mixup", "cutmix"):
            check_not_negative(f"augment.{name}", getattr(self, name))
        if self.repeats_rounding is not None:
            check_positive("augment.repeats_rounding", self.repeats_rounding)
        if self.color_jitter is not None:
            check_not_negative("augment.color_jitter", self.color_jitter)
        check_choice("augment.erase_mode", self.erase_mode, EraseMode)
        check("augment.erase_count", self.erase_count, ">= 1", lambda v: v >= 1)
        check_choice("augment.mix_mode", self.mix_mode, MixMode)

    @property
    def mixes(self) -> bool:
        """True if mixup or CutMix is on."""
        return self.mix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Loss: cross-entropy."""

    label_smoothing: float = 0.1
    """Part of the target probability that is spread evenly over all classes."""

    def __post_init__(self) -> None:
        check("loss.label_smoothing", self.label_smoothing, ">= 0 and < 1", lambda v: 0 <= v < 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Optimizer: arguments of `timm.optim.create_optimizer_v2`."""

    name: str = "adamw"
    """An optimizer that timm knows."""
    lr: float = 2e-3
    """Peak learning rate, for a global batch of `optim.lr_batch_size`."""
    lr_batch_size: int | None = None
    """The rate used is `lr * batch_size / lr_batch_size`; `null` uses `lr` without scaling."""
    weight_decay: float = 0.05
    """Weight decay; never on biases, norms and the parameters in the model's `no_weight_decay()`."""
    no_weight_decay: tuple[str, ...] = ("*.A_log", "*.A_b_log")
    """Patterns of the names of further parameters without weight decay."""
    eps: float = 1e-8
    """Added to the denominator of the update, if the optimizer has one."""
    betas: tuple[float, float] | None = None
    """Decay of the moments; `null` takes the optimizer's default."""
    momentum: float = 0.9
    """Momentum, if the optimizer has one."""
    clip_grad: float | None = 1.0
    """Gradient clipping threshold, see `optim.clip_mode`; `null` turns clipping off."""
    clip_mode: ClipMode = "norm"
    """Clip the global `norm`, each `value`, or each unit's norm relative to its weights (`agc`)."""
    layer_decay: float | None = None
    """Learning rate of a block relative to the next block; `null` gives all blocks the same rate."""
    layer_decay_of: LayerDecayOf = "blocks"
    """Decay the rate of all `blocks`, or, as the original's segmentation does, of the `stem` alone: patch and position
    embeddings get the rate that they have with `blocks`, and every block the full one."""
    trainable: tuple[str, ...] = ("*",)
    """Patterns of the names of trainable parameters; the rest is frozen. `["head.*"]` is a linear probe."""
    unfreeze_after: int | None = None
    """Epochs after which the frozen parameters are trained too; `null` keeps them frozen."""

    def __post_init__(self) -> None:
        check("optim.name", self.name, "the name of an optimizer", bool)
        check_positive("optim.lr", self.lr)
        if self.lr_batch_size is not None:
            check_positive("optim.lr_batch_size", self.lr_batch_size)
        check_not_negative("optim.weight_decay", self.weight_decay)
        check_positive("optim.eps", self.eps)
        if self.betas is not None:
            check("optim.betas", self.betas, "two numbers, >= 0 and < 1", lambda v: all(0 <= b < 1 for b in v))
        check("optim.momentum", self.momentum, ">= 0 and < 1", lambda v: 0 <= v < 1)
        if self.clip_grad is not None:
            check_positive("optim.clip_grad", self.clip_grad)
        check_choice("optim.clip_mode", self.clip_mode, ClipMode)
        if self.layer_decay is not None:
            check("optim.layer_decay", self.layer_decay, "> 0 and <= 1", lambda v: 0 < v <= 1)
        check_choice("optim.layer_decay_of", self.layer_decay_of, LayerDecayOf)
        check("optim.trainable", self.trainable, "at least one pattern", lambda v: len(v) > 0)
        if self.unfreeze_after is not None:
            check_positive("optim.unfreeze_after", self.unfreeze_after)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate schedule: arguments of `timm.scheduler.create_scheduler_v2`."""

    name: ScheduleName = "cosine"
    """`cosine` or `poly` (polynomial) from the peak to `schedule.min_lr`, `multistep` (a tenth of the rate after each
    of `schedule.milestones`), or `constant`; all after the warm-up."""
    power: float = 1.0
    """Exponent of the polynomial; 1 is a straight line."""
    milestones: tuple[int, ...] = ()
    """Optimizer steps, or epochs with unit `epoch`, after which `multistep` divides the rate by ten."""
    unit: ScheduleUnit = "step"
    """Update the rate every optimizer `step` or every `epoch`."""
    warmup_epochs: int = 2
    """Epochs of linear warm-up; they are part of `epochs`, and the schedule counts from the start."""
    warmup_steps: int | None = None
    """Optimizer steps of the warm-up, in place of `schedule.warmup_epochs`; needs unit `step`."""
    warmup_lr: float = 1e-6
    """Rate at the start of the warm-up; not scaled by the batch size."""
    min_lr: float = 1e-5
    """Rate at the end of the schedule; not scaled by the batch size."""
    lag_epochs: int = 0
    """Delay of the schedule in epochs, which is 1 in the original's scripts; needs unit `epoch`."""

    def __post_init__(self) -> None:
        check_choice("schedule.name", self.name, ScheduleName)
        check_choice("schedule.unit", self.unit, ScheduleUnit)
        for name in ("warmup_epochs", "warmup_lr", "min_lr", "lag_epochs"):
            check_not_negative(f"schedule.{name}", getattr(self, name))
        check_positive("schedule.power", self.power)
        rule = f"{'at least one' if self.name == 'multistep' else 'empty'} when schedule.name is {self.name!r}"
        check("schedule.milestones", self.milestones, rule, lambda v: bool(v) == (self.name == "multistep"))
        rule = "numbers > 0 that rise"
        check("schedule.milestones", self.milestones, rule, lambda v: all(a < b for a, b in pairwise((0, *v))))
        if self.warmup_steps is not None:
            check_not_negative("schedule.warmup_steps", self.warmup_steps)
            if self.unit != "step":
                raise ValueError(
                    f"schedule.warmup_steps must be null when schedule.unit is {self.unit!r}, got {self.warmup_steps}"
                )
        if self.lag_epochs and self.unit != "epoch":
            raise ValueError(
                f"schedule.lag_epochs must be 0 when schedule.unit is {self.unit!r}, got {self.lag_epochs}: "
                "a lag is counted in epochs"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSplit:
    """The part of one process in an optimizer step."""

    micro_batch_size: int
    """Images in one forward and backward pass."""
    accumulation_steps: int
    """Number of forward and backward passes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """All settings of a training run."""

    recipe: str = "digits"
    """Name of the recipe; the run folder is called after it."""
    task: TaskName = "classification"
    """What the model learns: `classification` of whole images, `segmentation`, a class for each pixel, or `detection`
    of objects, with or without masks."""
    epochs: int = 15
    """Passes over the training images."""
    max_steps: int | None = None
    """Optimizer steps of the whole run, in place of `epochs`; the last epoch may be a part of one."""
    batch_size: int = 64
    """Images in one optimizer step, over all processes."""
    micro_batch_size: int = 64
    """Largest number of images in a forward pass of a process; gradients accumulate up to `batch_size`."""
    eval_batch_size: int | None = None
    """Images in one forward pass of a process at evaluation; `null` takes `micro_batch_size`."""
    precision: Precision = "float32"
    """`float32`, `tf32` (float32 with faster matrix products), or autocast to `bfloat16` or `float16`."""
    compile: bool = False
    """Train with `torch.compile`; the first steps then take minutes."""
    ema_decay: float | None = 0.98
    """Decay of the averaged weights (EMA), per optimizer step; `null` turns averaging off."""
    best_by: BestBy = "better"
    """Select the best epoch by its `raw` weights, as the original does, by the averaged ones (`ema`), or by the
    `better` of both."""
    max_skipped_steps: int = 20
    """Stop after this many consecutive steps with a loss or gradient that is not finite; such steps are skipped."""
    seed: int = 0
    """Seed of all random draws."""
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1` or `mps`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    progressive: ProgressiveConfig = field(default_factory=ProgressiveConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        check("recipe", self.recipe, "a name without '/'", lambda v: bool(v) and "/" not in v and "\\" not in v)
        for name in ("epochs", "batch_size", "micro_batch_size", "max_skipped_steps"):
            check_positive(name, getattr(self, name))
        for name in ("max_steps", "eval_batch_size"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        check_choice("task", self.task, TaskName)
        check_choice("precision", self.precision, Precision)
        check_choice("best_by", self.best_by, BestBy)
        if self.ema_decay is not None:
            check("ema_decay", self.ema_decay, ">= 0 and < 1", lambda v: 0 <= v < 1)
        check("seed", self.seed, "between 0 and 2**32 - 1", lambda v: 0 <= v < 2**32)
        self._check_together()

    def _check_together(self) -> None:
        # A micro-batch is at most the batch, so that a small data set needs one setting less.
        if self.batch_size > self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size must be a multiple of micro_batch_size = {self.micro_batch_size}, got {self.batch_size}: "
                "change either"
            )
        if self.augment.mixes and self.micro_batch_size % 2:
            raise ValueError(
                "micro_batch_size must be even when augment.mixup or augment.cutmix is on, since they pair images, got "
                f"{self.micro_batch_size}"
            )
        if self.best_by == "ema" and self.ema_decay is None:
            raise ValueError("best_by must be 'raw' or 'better' when ema_decay is null, got 'ema'")
        self._check_schedule()
        start = self.progressive.start_size
        if start is not None and start > min(self.model.image_shape):
            raise ValueError(
                f"progressive.start_size must be <= the shorter side of model.img_size, {min(self.model.image_shape)}, "
                f"got {start}"
            )
        for name in ("mean", "std"):
            values = getattr(self.data, name)
            check(
                f"data.{name}",
                values,
                f"one number or one for each of model.in_chans = {self.model.in_chans} channels",
                lambda v: len(v) in (1, self.model.in_chans),
            )

    def _check_schedule(self) -> None:
        """Check the length of the run against the schedule of the learning rate."""
        schedule, steps = self.schedule, self.max_steps
        if steps is None:
            if schedule.warmup_steps is None and schedule.warmup_epochs > self.epochs:
                raise ValueError(
                    f"schedule.warmup_epochs must be <= epochs = {self.epochs}, got {schedule.warmup_epochs}: for a "
                    "short run set --schedule.warmup_epochs 0"
                )
            return
        if schedule.unit != "step":
            raise ValueError(f"schedule.unit must be 'step' when max_steps is {steps}, got {schedule.unit!r}")
        if schedule.warmup_steps is not None and schedule.warmup_steps > steps:
            raise ValueError(f"schedule.warmup_steps must be <= max_steps = {steps}, got {schedule.warmup_steps}")
        if self.progressive.start_size is not None and self.progressive.epochs is None:
            raise ValueError(f"progressive.epochs must be set when max_steps is {steps}, got None")

    def total_steps(self, updates_per_epoch: int) -> int:
        """Return the optimizer steps of the whole run.

        Args:
            updates_per_epoch: Optimizer steps in one epoch.
        """
        return self.epochs * updates_per_epoch if self.max_steps is None else self.max_steps

    def split_batch(self, processes: int) -> BatchSplit:
        """Return the part of one process in an optimizer step.

        Its micro-batches have `micro_batch_size` images, or the next smaller number that divides its share.

        Raises:
            ValueError: The processes cannot share `batch_size` images evenly.
        """
        share, rest = divmod(self.batch_size, processes)
        step = 2 if self.augment.mixes else 1  # mixing pairs the images of a micro-batch
        if rest or share % step:
            multiple = f"twice the {processes}" if step == 2 else f"the {processes}"
            raise ValueError(
                f"batch_size must be a multiple of {multiple} processes that share it, got {self.batch_size}"
            )
        largest = min(self.micro_batch_size, share)
        size = next(size for size in range(largest, 0, -1) if share % size == 0 and size % step == 0)
        return BatchSplit(micro_batch_size=size, accumulation_steps=share // size)

    @property
    def peak_lr(self) -> float:
        """The highest learning rate of the run, scaled to the batch size."""
        base = self.optim.lr_batch_size
        return self.optim.lr if base is None else self.optim.lr * self.batch_size / base
