"""The training loop: epochs of optimizer steps, evaluation, and files that let a run be carried on."""

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import torch
from rich.console import Console
from timm.utils import random_seed
from torch import Tensor

from vim.checkpoints.io import (
    CheckpointError,
    load_checkpoint,
    load_into,
    rng_state,
    save_checkpoint,
    save_weights,
    set_rng_state,
)
from vim.config.load import config_to_dict
from vim.config.schema import TrainConfig
from vim.data.loaders import build_loaders
from vim.data.sources import image_files
from vim.data.tensors import TensorImages
from vim.engine.evaluate import EvalResult, evaluate
from vim.engine.log import Recorder, Reporter, describe_epoch
from vim.engine.model import build_model, describe_model, resolve_device
from vim.engine.optim import Schedule, build_ema, build_optimizer, clip_gradients
from vim.engine.plots import draw_curves
from vim.engine.predictor import weights_metadata
from vim.engine.run_folder import RunFolder
from vim.engine.task import ClassificationTask, set_matmul_precision

_CURVES_INTERVAL = 30.0  # seconds between two drawings of the curves


class NonFiniteError(RuntimeError):
    """The loss or its gradient became infinite or not a number; the message names the step."""


@dataclasses.dataclass(slots=True)
class _EpochMeter:
    """Sums over the optimizer steps of an epoch."""

    began: float = dataclasses.field(default_factory=time.perf_counter)
    steps: int = 0
    images: int = 0
    loss: float = 0.0
    hits: float = 0.0
    grad_norm: float = 0.0
    waited: float = 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began


class Trainer:
    """A training run.

    Making one opens the data and builds the model, and writes nothing; `fit` trains.

    Args:
        config: The settings.
        folder: Where the run's files go.
        console: Where progress is shown; `None` is the standard output.

    Raises:
        ValueError: A setting does not fit the data, the model or the machine.
        ModuleNotFoundError: The data set needs a package that is not installed.
    """

    def __init__(self, config: TrainConfig, folder: RunFolder, console: Console | None = None) -> None:
        self.config, self.folder, self._console = config, folder, console
        self.device = resolve_device(config.device)
        set_matmul_precision(config.precision)
        random_seed(config.seed)
        self.loaders = build_loaders(config, self.device)
        self.updates_per_epoch = len(self.loaders.train) // config.accumulation_steps
        self.model = build_model(config.model, len(self.loaders.class_names)).to(self.device)
        self.ema = build_ema(self.model, config.ema_decay)
        self.optimizer = build_optimizer(self.model, config)
        self.schedule = Schedule(self.optimizer, config, self.updates_per_epoch)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.task = ClassificationTask(config, len(self.loaders.class_names), self.device)
        self.epoch = 0
        """Epochs done."""
        self.step = 0
        """Optimizer steps done."""
        self.history: list[dict[str, Any]] = []
        """Figures of the epochs done, one row each."""
        self.best: dict[str, Any] | None = None
        """The best held-out figures so far: epoch, weights (`raw` or `ema`), top1 and loss."""
        self._curves_drawn = -math.inf

    def resume(self) -> None:
        """Go back to the end of the last whole epoch that the run's folder holds.

        Raises:
            FileNotFoundError: The run has not finished an epoch.
            CheckpointError: Its checkpoint is damaged, or is that of another model.
        """
        state = load_checkpoint(self.folder.last)
        missing = {"epoch", "step", "model", "model_ema", "optimizer", "scaler", "rng", "history", "best"} - set(state)
        if missing:
            raise CheckpointError(f"{self.folder.last} cannot be resumed from: it lacks {min(missing)!r}")
        load_into(self.model, state["model"], self.folder.last)
        if self.ema is not None:
            load_into(self.ema.module, state["model_ema"], self.folder.last)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.history, self.best = list(state["history"]), state["best"]
        set_rng_state(state["rng"])

    def fit(self) -> dict[str, Any]:
        """Train until the last epoch.

        Returns:
            The best held-out figures: epoch, weights (`raw` or `ema`), top1 and loss.

        Raises:
            NonFiniteError: The loss or its gradient became infinite or not a number.
        """
        config = self.config
        self.folder.write_start(config, self.device)
        held_out = self.loaders.sets.val
        if isinstance(held_out, TensorImages):
            self.folder.write_samples(held_out, self.loaders.class_names)
        recorder = Recorder(self.folder.summary, self.folder.tensorboard, self.step)
        total_steps = config.epochs * self.updates_per_epoch
        with closing(recorder), Reporter(total_steps, self.step, self._console) as reporter:
            for line in self._describe():
                reporter.line(line)
            while self.epoch < config.epochs:
                row = self._run_epoch(reporter)
                reporter.line(describe_epoch(row, config.epochs))
                recorder.write_epoch(self.history)
                self._draw_curves(last=self.epoch == config.epochs)
        if self.best is None:
            raise RuntimeError("the run has no epoch, and so no best one")
        return self.best

    def example_image(self) -> str:
        """Return the path of a held-out image, for the user to try the model on."""
        samples = sorted(self.folder.samples.glob("*.png"))
        return str(next(iter([*samples, *image_files(self.loaders.sets.val, 1)]), "IMAGE"))

    def _run_epoch(self, reporter: Reporter) -> dict[str, Any]:
        """Train for an epoch, evaluate, save, and return the epoch's row of the history."""
        meter, lr = self._train_epoch(reporter)
        train_seconds = meter.seconds
        raw, averaged = self._evaluate()
        self.epoch += 1
        row = {
            "epoch": self.epoch,
            "step": self.step,
            "lr": lr,
            "train_loss": meter.loss / meter.steps,
            "train_top1": 100 * meter.hits / meter.images,
            "val_loss": raw.loss,
            "val_top1": raw.top1,
            "val_top5": raw.top5,
            "ema_loss": averaged.loss if averaged else None,
            "ema_top1": averaged.top1 if averaged else None,
            "ema_top5": averaged.top5 if averaged else None,
            "grad_norm": meter.grad_norm / meter.steps,
            "images_per_second": meter.images / train_seconds,
            "data_wait_percent": 100 * meter.waited / train_seconds,
            "train_unreadable": self.loaders.train_unreadable.take(),
            "val_unreadable": len(self.loaders.sets.val) - raw.count,
            "seconds": meter.seconds,
        }
        self.history.append(row)
        self._save(raw, averaged)
        return row

    def _train_epoch(self, reporter: Reporter) -> tuple[_EpochMeter, float]:
        """Take the optimizer steps of an epoch; return its sums and the learning rate of its last step."""
        self.model.train()
        self.loaders.set_epoch(self.epoch)
        batches = iter(self.loaders.train)
        meter, lr = _EpochMeter(), 0.0
        words = f"epoch {self.epoch + 1}/{self.config.epochs}"
        for _ in range(self.updates_per_epoch):
            lr = self.schedule.set(self.epoch, self.step)
            self._update(batches, meter)
            self.step += 1
            accuracy, speed = 100 * meter.hits / meter.images, meter.images / meter.seconds
            reporter.step(words, self.step, meter.loss / meter.steps, accuracy, speed)
        return meter, lr

    def _update(self, batches: Iterator[tuple[Tensor, Tensor]], meter: _EpochMeter) -> None:
        """Take one optimizer step over as many micro-batches as make a batch."""
        config, parts = self.config, []
        for _ in range(config.accumulation_steps):
            waiting = time.perf_counter()
            images, labels = next(batches)
            meter.waited += time.perf_counter() - waiting
            loss, hits = self.task.training_loss(self.model, images, labels)
            loss = loss / config.accumulation_steps
            self.scaler.scale(loss).backward()
            parts.append(torch.stack([loss.detach(), hits.to(loss.dtype)]))
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.model, config.optim)
        # One transfer from the device a step, before the weights change.
        total_loss, total_hits, grad_norm = torch.cat([torch.stack(parts).sum(dim=0), norm[None].float()]).tolist()
        self._check_finite(total_loss, grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model)
        meter.steps += 1
        meter.images += config.batch_size
        meter.loss += total_loss
        meter.hits += total_hits
        meter.grad_norm += grad_norm if math.isfinite(grad_norm) else 0.0  # infinite where float16 overflowed

    def _check_finite(self, loss: float, grad_norm: float) -> None:
        """Stop the run at a loss that is not finite, or a gradient, unless the scaler of float16 skips it anyway."""
        if math.isfinite(loss) and (math.isfinite(grad_norm) or self.scaler.is_enabled()):
            return
        what = f"the norm of the gradient is {grad_norm}" if math.isfinite(loss) else f"the loss is {loss}"
        steps, lr = self.config.epochs * self.updates_per_epoch, self.optimizer.param_groups[0]["lr"]
        raise NonFiniteError(
            f"{what} at step {self.step + 1} of {steps}, in epoch {self.epoch + 1}, at a learning rate of {lr:.3g}; "
            "the step was not taken: try a lower optim.lr, optim.clip_grad or float32"
        )

    def _evaluate(self) -> tuple[EvalResult, EvalResult | None]:
        """Evaluate the weights, and the averaged weights if there are any."""
        raw = evaluate(self.model, self.loaders.val, self.task.autocast)
        expected = len(self.loaders.sets.val) - self.loaders.val_unreadable.take()
        if raw.count != expected:
            raise RuntimeError(
                f"evaluation counted {raw.count} images, of which the held-out set has {expected} that can be read"
            )
        averaged = evaluate(self.ema.module, self.loaders.val, self.task.autocast) if self.ema is not None else None
        self.loaders.val_unreadable.take()  # the same images again
        return raw, averaged

    def _save(self, raw: EvalResult, averaged: EvalResult | None) -> None:
        """Write the last checkpoint, and the best one if this epoch is it."""
        choices = [("raw", raw)] + ([("ema", averaged)] if averaged is not None else [])
        weights, result = max(choices, key=lambda choice: (choice[1].top1, -choice[1].loss))
        figures = {"epoch": self.epoch, "weights": weights, "top1": result.top1, "loss": result.loss}
        improved = self.best is None or (result.top1, -result.loss) > (self.best["top1"], -self.best["loss"])
        if improved:
            self.best = figures
        model_ema = self.ema.module.state_dict() if self.ema is not None else None
        common = {
            "epoch": self.epoch,
            "step": self.step,
            "weights": weights,
            "figures": figures,
            "config": config_to_dict(self.config),
            "class_names": list(self.loaders.class_names),
            "model": self.model.state_dict(),
            "model_ema": model_ema,
        }
        if improved:
            save_checkpoint(self.folder.best, common)
            chosen = self.model.state_dict() if weights == "raw" or model_ema is None else model_ema
            save_weights(self.folder.best_weights, chosen, weights_metadata(self.config, self.loaders.class_names))
        rest = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": rng_state(),
            "history": self.history,
            "best": self.best,
        }
        save_checkpoint(self.folder.last, {**common, **rest})

    def _draw_curves(self, last: bool) -> None:
        """Draw the curves at the end, and before it not more often than is worth the time."""
        if last or time.monotonic() - self._curves_drawn > _CURVES_INTERVAL:
            draw_curves(self.history, self.folder.curves, f"{self.config.recipe}: {self.config.model.name}")
            self._curves_drawn = time.monotonic()

    def _describe(self) -> list[str]:
        """Say what the run is about to do, with what the settings resolve to."""
        config, sets = self.config, self.loaders.sets
        where = f" in {config.data.path}" if config.data.path else ""
        parts = f"{config.accumulation_steps} x {config.micro_batch_size}" if config.accumulation_steps > 1 else ""
        carried_on = f"carried on after epoch {self.epoch}" if self.epoch else "new"
        return [
            f"run      {self.folder.path} ({carried_on})",
            f"model    {describe_model(self.model, config.model)}",
            f"data     {config.data.dataset}{where}: {len(sets.train):,} training images, {len(sets.val):,} held out, "
            f"{len(sets.class_names)} classes",
            f"training {config.epochs} epochs of {self.updates_per_epoch} steps, batch {config.batch_size}"
            f"{f' = {parts}' if parts else ''}, {config.optim.name} at learning rate {config.peak_lr:g}, "
            f"{config.precision} on {self.device}",
        ]
