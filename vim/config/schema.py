"""Every setting of a training run, as frozen dataclasses; the defaults are the `digits` recipe.

A setting is checked where it is made: a value out of range is a `ValueError` that names the setting as the command
line spells it (`optim.lr`) and the value it got. The docstring under a field is its help text on the command line.
"""

from dataclasses import dataclass, field
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
from vim.config.run import DistillConfig, LogConfig, ProgressiveConfig, SaveConfig

Precision = Literal["float32", "tf32", "bfloat16", "float16"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
EraseMode = Literal["const", "rand", "pixel"]
MixMode = Literal["batch", "pair", "elem"]
ScheduleName = Literal["cosine", "constant"]
ScheduleUnit = Literal["epoch", "step"]
StartingWeights = Literal["best", "raw", "ema"]
Resampling = Literal["exact", "reference"]
ClipMode = Literal["norm", "value", "agc"]
BestBy = Literal["raw", "ema", "better"]
TaskName = Literal["classification"]

# What Pillow reads without further packages, by the endings in use.
IMAGE_EXTENSIONS = (
    *(".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm"),
    *(".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Model: what `timm.create_model` is called with."""

    name: str = "vim_tiny_patch16_224"
    """A model that timm knows, such as `vim_tiny_patch16_224`."""
    img_size: int | tuple[int, int] = 32
    """Side of the square input in pixels, or `[height, width]`."""
    in_chans: int = 1
    """Channels of the input: 1 for grey, 3 for colour."""
    num_classes: int | None = None
    """Number of classes; `null` takes what the data has."""
    drop_rate: float = 0.0
    """Dropout before the classifier."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the last block; the blocks before it get less."""
    grad_checkpointing: bool = False
    """Keep fewer activations and compute them again in the backward pass: less memory, about a third more time."""
    pretrained: bool = False
    """Start from the published weights of `model.name`, unless `model.checkpoint` names others."""
    checkpoint: str | None = None
    """Start from the weights in this file (`.pth` of the original's or ours, `.safetensors`) or run folder."""
    pretrained_weights: StartingWeights = "best"
    """Which weights to start from: `raw`, `ema` (their average), or `best`, which is what a run of ours found better on
    held-out images and `raw` for any other file."""
    pretrained_resampling: Resampling = "exact"
    """How to resample the position embedding of another grid: `exact`, or `reference`, which does what the original's
    fine-tuning does and moves the patches before the middle class token by one."""
    args: dict[str, Any] = field(
        default_factory=lambda: {"patch_size": 8, "embed_dim": 64, "depth": 4},
    )
    """Further arguments of the model, such as `{depth: 12}`; one at a time with `--model.args.depth 12`."""

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
        own = {"img_size", "in_chans", "num_classes", "drop_rate", "drop_path_rate", "pretrained"} & set(self.args)
        if own:
            name = min(own)
            raise ValueError(f"model.args must not hold {name!r}: set model.{name} instead, got {self.args[name]!r}")

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the input in pixels."""
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Data: which images, and how an image becomes a tensor at evaluation."""

    dataset: str = "digits"
    """`digits` (comes with scikit-learn), `fashion_mnist` (Debian's package), `synthetic` (random images), `folder` (a
    folder or tar file a split, in it a folder a class), `wds/` (shards of WebDataset), or a data set of torchvision or
    Hugging Face, such as `torch/cifar10` and `hfds/NAME`."""
    path: str | None = None
    """Where the images are; for `folder`, a folder with one sub-folder a split."""
    extensions: tuple[str, ...] = IMAGE_EXTENSIONS
    """Endings of image files, in either case; files with another one are passed over, and counted at the start."""
    download: bool = False
    """Fetch a data set of torchvision or Hugging Face that is not in `data.path` yet."""
    input_key: str | None = None
    """Column of the images in a data set of Hugging Face; `null` is `image`."""
    target_key: str | None = None
    """Column of the labels in a data set of Hugging Face; `null` is `label`."""
    train_split: str = "train"
    """Name of the training split."""
    val_split: str = "val"
    """Name of the held-out split."""
    crop_pct: float = 1.0
    """Side of the centre crop over the side that the image is resized to, at evaluation."""
    interpolation: Interpolation = "bicubic"
    """Resampling at evaluation."""
    mean: tuple[float, ...] = (0.309,)
    """Mean of a channel, for pixels between 0 and 1; one value, or one a channel."""
    std: tuple[float, ...] = (0.35,)
    """Standard deviation of a channel, for pixels between 0 and 1; one value, or one a channel."""
    bits: int = 16
    """Bits in use of a grey image with 16 bits a pixel, such as 12; the upper 8 of them are kept."""
    workers: int = 0
    """Processes that read images; 0 reads in the training process."""
    pin_memory: bool = False
    """Read into page-locked memory, which a GPU copies from faster."""
    synthetic_images: int = 512
    """Number of training images of the `synthetic` set; a quarter as many are held out."""

    def __post_init__(self) -> None:
        check("data.dataset", self.dataset, "the name of a data set", bool)
        if self.dataset == "folder" and not self.path:
            raise ValueError(f"data.path must name the image folder when data.dataset is 'folder', got {self.path!r}")
        if self.dataset.lower().startswith("wds/") and not self.path:
            raise ValueError(
                f"data.path must name the folder of shards when data.dataset is {self.dataset!r}, got {self.path!r}"
            )
        if self.dataset in ("digits", "synthetic") and self.path:
            raise ValueError(
                f"data.path must be null when data.dataset is {self.dataset!r}, which reads no files, got "
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
    """Share of the image's area that a random crop keeps, lowest and highest."""
    ratio: tuple[float, float] = (0.8, 1.25)
    """Aspect ratio of a random crop, lowest and highest."""
    interpolation: Interpolation = "bilinear"
    """Resampling of a random crop."""
    hflip: float = 0.0
    """Probability of a left-right flip."""
    vflip: float = 0.0
    """Probability of an up-down flip."""
    color_jitter: float | None = None
    """Strength of colour jitter; timm leaves it out when `augment.auto_augment` is on."""
    auto_augment: str | None = None
    """A policy of timm, such as `rand-m9-mstd0.5-inc1`."""
    repeats: int = 0
    """Repeated augmentation: show an image this many times an epoch, of fewer images; 0 or 1 turns it off."""
    repeats_rounding: int | None = None
    """With repeated augmentation, cut the images that an epoch shows to a multiple of this; 256 is the original's."""
    erase_prob: float = 0.0
    """Probability of erasing a random rectangle."""
    erase_mode: EraseMode = "pixel"
    """What an erased rectangle holds: `const` (zero), `rand` (one random colour) or `pixel` (noise)."""
    erase_count: int = 1
    """Most rectangles to erase in an image."""
    mixup: float = 0.0
    """Alpha of mixup; 0 turns it off."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0 turns it off."""
    mix_prob: float = 1.0
    """Probability of mixing a batch, when mixup or CutMix is on."""
    mix_switch_prob: float = 0.5
    """Probability of CutMix rather than mixup, when both are on."""
    mix_mode: MixMode = "batch"
    """Draw the mixing weight once a `batch`, `pair` or image (`elem`)."""

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
        """Whether mixup or CutMix is on."""
        return self.mix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Loss: cross-entropy."""

    label_smoothing: float = 0.1
    """Share of the target spread evenly over all classes."""

    def __post_init__(self) -> None:
        check("loss.label_smoothing", self.label_smoothing, ">= 0 and < 1", lambda v: 0 <= v < 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Optimizer: what `timm.optim.create_optimizer_v2` is called with."""

    name: str = "adamw"
    """An optimizer that timm knows."""
    lr: float = 2e-3
    """Peak learning rate, for a global batch of `optim.lr_batch_size`."""
    lr_batch_size: int | None = None
    """The rate used is `lr * batch_size / lr_batch_size`; `null` takes `lr` as it is."""
    weight_decay: float = 0.05
    """Weight decay; never on biases, norms and what the model's `no_weight_decay()` names."""
    no_weight_decay: tuple[str, ...] = ("*.A_log", "*.A_b_log")
    """More parameters without weight decay, as patterns of their names."""
    eps: float = 1e-8
    """Added to the denominator of the update, where the optimizer has one."""
    betas: tuple[float, float] | None = None
    """Decay of the moments; `null` takes the optimizer's own."""
    momentum: float = 0.9
    """Momentum, where the optimizer has one."""
    clip_grad: float | None = 1.0
    """Largest gradient, as `optim.clip_mode` measures it; `null` turns clipping off."""
    clip_mode: ClipMode = "norm"
    """Clip the global `norm`, each `value`, or each unit's norm relative to its weights (`agc`)."""
    layer_decay: float | None = None
    """Each block learns at this share of the rate of the block after it; `null` gives all the same rate."""
    trainable: tuple[str, ...] = ("*",)
    """Parameters that learn, as patterns of their names; the rest is frozen. `["head.*"]` is a linear probe."""
    unfreeze_after: int | None = None
    """Epochs after which the frozen rest learns, too; `null` keeps it frozen."""

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
        check("optim.trainable", self.trainable, "at least one pattern", lambda v: len(v) > 0)
        if self.unfreeze_after is not None:
            check_positive("optim.unfreeze_after", self.unfreeze_after)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate over time: what `timm.scheduler.create_scheduler_v2` is called with."""

    name: ScheduleName = "cosine"
    """`cosine` from the peak to `schedule.min_lr`, or `constant`; both after the warm-up."""
    unit: ScheduleUnit = "step"
    """Change the rate every optimizer `step` or every `epoch`."""
    warmup_epochs: int = 2
    """Epochs of linear warm-up; they are part of `epochs`, and the cosine counts from the start."""
    warmup_lr: float = 1e-6
    """Rate at the start of the warm-up; not scaled by the batch size."""
    min_lr: float = 1e-5
    """Rate at the end of the cosine; not scaled by the batch size."""
    lag_epochs: int = 0
    """Epochs that the schedule is late by, as in the original's scripts, where it is 1; needs unit `epoch`."""

    def __post_init__(self) -> None:
        check_choice("schedule.name", self.name, ScheduleName)
        check_choice("schedule.unit", self.unit, ScheduleUnit)
        for name in ("warmup_epochs", "warmup_lr", "min_lr", "lag_epochs"):
            check_not_negative(f"schedule.{name}", getattr(self, name))
        if self.lag_epochs and self.unit != "epoch":
            raise ValueError(
                f"schedule.lag_epochs must be 0 when schedule.unit is {self.unit!r}, got {self.lag_epochs}: "
                "a lag is counted in epochs"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSplit:
    """What one process does of an optimizer step."""

    micro_batch_size: int
    """Images in one forward and backward."""
    accumulation_steps: int
    """Forward and backward passes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A training run, whole."""

    recipe: str = "digits"
    """Name of the recipe; the run folder is called after it."""
    task: TaskName = "classification"
    """What the model learns: `classification` of whole images."""
    epochs: int = 15
    """Passes over the training images."""
    batch_size: int = 64
    """Images in one optimizer step, over all processes."""
    micro_batch_size: int = 64
    """Most images in one forward and backward of a process; gradients add up until `batch_size` is reached."""
    eval_batch_size: int | None = None
    """Images in one forward of a process at evaluation; `null` takes `micro_batch_size`."""
    precision: Precision = "float32"
    """`float32`, `tf32` (float32 with faster matrix products), or autocast to `bfloat16` or `float16`."""
    compile: bool = False
    """Train the model compiled by `torch.compile`; the first steps then take minutes."""
    ema_decay: float | None = 0.98
    """Decay of the averaged weights, per optimizer step; `null` keeps no average."""
    best_by: BestBy = "better"
    """Judge an epoch by its `raw` weights, as the original does, by the averaged ones (`ema`), or by the `better`."""
    max_skipped_steps: int = 20
    """Stop after so many steps in a row whose loss or gradient is not finite; none of them is taken."""
    seed: int = 0
    """Seed of every random choice."""
    device: str = "auto"
    """`auto` takes a GPU when there is one; or `cpu`, `cuda`, `cuda:1`, `mps`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    progressive: ProgressiveConfig = field(default_factory=ProgressiveConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        check("recipe", self.recipe, "a name without '/'", lambda v: bool(v) and "/" not in v and "\\" not in v)
        for name in ("epochs", "batch_size", "micro_batch_size", "max_skipped_steps"):
            check_positive(name, getattr(self, name))
        if self.eval_batch_size is not None:
            check_positive("eval_batch_size", self.eval_batch_size)
        check_choice("task", self.task, TaskName)
        check_choice("precision", self.precision, Precision)
        check_choice("best_by", self.best_by, BestBy)
        if self.ema_decay is not None:
            check("ema_decay", self.ema_decay, ">= 0 and < 1", lambda v: 0 <= v < 1)
        check("seed", self.seed, "between 0 and 2**32 - 1", lambda v: 0 <= v < 2**32)
        self._check_together()

    def _check_together(self) -> None:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size must be a multiple of micro_batch_size = {self.micro_batch_size}, got {self.batch_size}"
            )
        if self.augment.mixes and self.micro_batch_size % 2:
            raise ValueError(
                "micro_batch_size must be even when augment.mixup or augment.cutmix is on, which pair images, got "
                f"{self.micro_batch_size}"
            )
        if self.best_by == "ema" and self.ema_decay is None:
            raise ValueError("best_by must be 'raw' or 'better' when ema_decay is null, got 'ema'")
        if self.schedule.warmup_epochs > self.epochs:
            raise ValueError(
                f"schedule.warmup_epochs must be <= epochs = {self.epochs}, got {self.schedule.warmup_epochs}: a run "
                "of few epochs needs --schedule.warmup_epochs 0"
            )
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

    def split_batch(self, processes: int) -> BatchSplit:
        """Return what one of several processes does of an optimizer step.

        Its micro-batches are of `micro_batch_size` images, or of the next smaller number that divides its share.

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
