"""The training loop: epochs of optimizer steps, evaluation, and files that let a run be carried on."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from itertools import chain
from typing import Any, NoReturn, cast

import torch
from rich.console import Console
from timm.utils import random_seed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from vim.checkpoints.io import load_checkpoint, save_checkpoint, save_weights
from vim.config.load import config_to_dict, flatten
from vim.config.schema import TrainConfig
from vim.data.contents import contents_of
from vim.data.listing import printable
from vim.data.loaders import build_loaders
from vim.data.sources import first_readable_file
from vim.data.tensors import TensorImages
from vim.inference.evaluation import EvalResult, EvaluationStopped, evaluate
from vim.inference.plots import draw_curves
from vim.inference.trained_model import weights_metadata
from vim.models.build import build_model, check_sizes, checkpoint_gradients, describe_model, without_weights
from vim.runtime.agreement import check_agreement, check_weights, run_facts
from vim.runtime.device import resolve_device
from vim.runtime.distributed import Processes
from vim.runtime.precision import set_matmul_precision
from vim.runtime.preemption import RunStopped, StopRequest
from vim.tasks.classification import ClassificationTask
from vim.training.data_record import changes_since_record, describe_data, write_record
from vim.training.freeze import Freezer
from vim.training.log import Recorder, Reporter, describe_epoch, loading_advice
from vim.training.metrics import EpochMeter, peak_memory_gib
from vim.training.nonfinite import (
    CHECKPOINT_FROM_BEFORE,
    NonFiniteError,
    bad_parameter,
    describe_nonfinite,
    first_bad_tensor,
)
from vim.training.optim import Schedule, build_ema, build_optimizer, clip_gradients, gradient_norm
from vim.training.run_folder import RunFolder
from vim.training.run_lock import FolderInUse
from vim.training.state import Position, SaveClock, capture_rest, capture_weights, restore
from vim.training.trackers import check_trackers, open_trackers

_CURVES_INTERVAL = 30.0  # seconds between two drawings of the curves


class Trainer:
    """A training run, as one of its processes sees it.

    Making one opens the data and builds the model, and writes nothing; `fit` trains.

    Args:
        config: The settings.
        folder: Where the run's files go; the main process writes them.
        console: Where the main process shows progress; `None` is the standard output.
        processes: The processes that train together; `None` is this one alone.

    Raises:
        ValueError: A setting does not fit the data, the model, the machine or the number of processes.
        ModuleNotFoundError: The data set needs a package that is not installed.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        console: Console | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.config, self.folder = config, folder
        self.processes = processes or Processes()
        self._console = console if self.processes.is_main else Console(quiet=True)
        self.device = resolve_device(config.device, self.processes.local_rank)
        self.batch = config.split_batch(self.processes.size)
        check_trackers(config.log.trackers)
        set_matmul_precision(config.precision)
        random_seed(config.seed)  # the same in all processes, so that their models begin equal
        self.loaders = build_loaders(config, self.device, self.processes.rank, self.processes.size)
        self.updates_per_epoch = len(self.loaders.train) // self.batch.accumulation_steps
        self._found_empty = not folder.last.exists()
        start = config.model if self._found_empty else without_weights(config.model)  # resuming replaces them
        class_names = self.loaders.class_names
        self.model = build_model(start, len(class_names), class_names).to(self.device)
        self.ema = build_ema(self.model, config.ema_decay)
        if config.model.grad_checkpointing:
            checkpoint_gradients(self.model, config.model)
        self.optimizer = build_optimizer(self.model, config)
        self._freezer = Freezer(self.model, config.optim)
        self.schedule = Schedule(self.optimizer, config, self.updates_per_epoch)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.task = ClassificationTask(config, self.loaders.class_names, self.device)
        for shape in sorted({self.task.image_shape(epoch) for epoch in range(config.epochs)}, reverse=True):
            check_sizes(self.model, shape, config, self.device)
        if self.processes.size > 1:
            random_seed(config.seed, self.processes.rank)  # dropout and mixing differ
        self.position = Position()
        self._contents = contents_of(self.loaders.sets)
        self._changes: list[str] = []
        self._parallel: nn.Module | None = None
        self._train_model: Callable[[Tensor], Tensor] | None = None
        self._stop = StopRequest()
        self._save_clock = SaveClock(config.save)
        self._curves_drawn = -math.inf

    def resume(self) -> None:
        """Go back to the last checkpoint in the run's folder; a run that had none yet begins anew.

        Raises:
            CheckpointError: The checkpoint is damaged, or has another model, other settings or other classes.
            FolderInUse: Another process writes into the run's folder.
        """
        if not self.folder.last.exists():
            return
        with ExitStack() as undo:
            if self.processes.is_main:
                self.folder.lock.acquire()  # before the checkpoint is read, which may not change after that
                undo.callback(self.folder.lock.release)
            restore(self, load_checkpoint(self.folder.last))
            if self.processes.is_main:
                self._changes = changes_since_record(self.folder.images, self._contents)
            undo.pop_all()

    def fit(self) -> dict[str, Any]:
        """Train until the last epoch.

        Returns:
            The best held-out figures: epoch, weights (`raw` or `ema`), top1 and loss.

        Raises:
            Disagreement: The processes were started with other settings, data or weights than each other.
            FolderInUse: Another process writes into the run's folder.
            NonFiniteError: The loss or its gradient was infinite or not a number in too many steps in a row.
            RunStopped: The run got SIGTERM, and has saved where it was.
        """
        config, position = self.config, self.position
        total_steps = config.epochs * self.updates_per_epoch
        self._check_agreement()
        with (
            self._hold_folder(),
            self._stop.listen(),
            closing(self._open_records()) as recorder,
            Reporter(total_steps, position.step, self._console) as reporter,
        ):
            for line in self._describe():
                reporter.line(line)
            while position.epoch < config.epochs:
                row = self._run_epoch(reporter, recorder)
                reporter.line(describe_epoch(row, config.epochs))
                for line in loading_advice(row, config.data.workers):
                    reporter.line(line)
                if self.processes.is_main:
                    recorder.write_epoch(position.history)
                    self._draw_curves(last=position.epoch == config.epochs)
        if position.best is None:
            raise RuntimeError("the run has no epoch, and so no best one")
        return position.best

    def example_image(self) -> str:
        """Return the path of a held-out image, for the user to try the model on."""
        samples = sorted(self.folder.samples.glob("*.png"))
        return str(next(iter(samples), None) or first_readable_file(self.loaders.sets.val) or "IMAGE")

    def _check_agreement(self) -> None:
        """Compare what all processes must share; by the wrong data or weights they would train silently."""
        facts = run_facts(self.config, self.loaders.class_names, self._contents)
        of_process = [
            ("the kind of device", self.device.type),
            ("the epoch to begin in", self.position.epoch),
            ("the step to begin at", self.position.step),
        ]
        check_agreement(self.processes, chain(facts, of_process))
        check_weights(self.processes, self.model)

    @contextmanager
    def _hold_folder(self) -> Iterator[None]:
        """Keep other processes from writing into the run's folder; if the main process cannot, none goes on."""
        error: FolderInUse | OSError | None = None
        if self.processes.is_main:
            try:
                self.folder.lock.acquire()
                if self._found_empty and self.folder.last.exists():
                    self.folder.lock.release()
                    raise FolderInUse(f"{self.folder.path} has become the folder of another run meanwhile")
            except (FolderInUse, OSError) as problem:
                error = problem
        error = self.processes.broadcast(error)
        if error is not None:
            raise error
        self._found_empty = False
        try:
            yield
        finally:
            self.folder.lock.release()

    def _open_records(self) -> Recorder:
        """Write the files that a run begins with, and open those that it adds to."""
        if not self.processes.is_main:
            return Recorder(None)
        self.folder.write_start(self.config, self.device)
        write_record(self.folder.images, self._contents)
        held_out = self.loaders.sets.val
        if isinstance(held_out, TensorImages):
            self.folder.write_samples(held_out, self.loaders.class_names)
        settings = {
            name: printable(value) if isinstance(value, str) else value
            for name, value in flatten(config_to_dict(self.config)).items()
        }
        trackers = open_trackers(self.config.log.trackers, self.folder.path, settings, self.position.step)
        return Recorder(self.folder.summary, trackers)

    def _run_epoch(self, reporter: Reporter, recorder: Recorder) -> dict[str, Any]:
        """Train for what is left of an epoch, evaluate, save; return the figures of the epoch."""
        position = self.position
        meter = EpochMeter(position.meter)
        lr = self._train_epoch(meter, reporter, recorder)
        train_seconds = meter.seconds
        if meter.steps == 0:
            raise NonFiniteError(
                f"no step of epoch {position.epoch + 1} had a finite loss and gradient, and {CHECKPOINT_FROM_BEFORE}"
            )
        try:
            raw, averaged = self._evaluate()
        except EvaluationStopped:
            self._save_and_stop(meter)
        unreadable = len(self.loaders.sets.val) - raw.count
        row = meter.row(train_seconds, peak_memory_gib(self.device), raw, averaged, unreadable)
        position.epoch, position.updates, position.meter = position.epoch + 1, 0, None
        row = {"epoch": position.epoch, "step": position.step, "lr": lr, **row}
        position.history.append(row)
        self._save_epoch(raw, averaged)
        return row

    def _train_epoch(self, meter: EpochMeter, reporter: Reporter, recorder: Recorder) -> float:
        """Take the optimizer steps that are left of an epoch; return the learning rate of its last step."""
        position = self.position
        self._begin_epoch()
        self.loaders.set_epoch(position.epoch, position.updates * self.batch.accumulation_steps)
        batches = iter(self.loaders.train)
        lr = self.schedule.set(position.epoch, max(0, position.step - 1))
        words = f"epoch {position.epoch + 1}/{self.config.epochs}"
        while position.updates < self.updates_per_epoch:
            lr = self.schedule.set(position.epoch, position.step)
            stop, save = self._update(batches, meter, reporter)
            speed = meter.images / meter.seconds
            reporter.step(words, position.step, meter.mean_loss, meter.top1, speed)
            if position.step % self.config.log.steps == 0:
                recorder.write_step(meter.last_step() | {"lr": lr}, position.step)
            if stop:
                self._save_and_stop(meter)
            if save:
                self._save_within_epoch(meter)
        return lr

    def _begin_epoch(self) -> None:
        """Put the model into training mode, and wrap it for training if other parameters learn than before."""
        if self._freezer.begin_epoch(self.position.epoch) or self._train_model is None:
            self._parallel = self.processes.parallel(self.model)
            self._train_model = torch.compile(self._parallel) if self.config.compile else self._parallel

    @record_function("vim: step")
    def _update(self, batches: Iterator[tuple[Tensor, Tensor]], meter: EpochMeter, reporter: Reporter) -> list[bool]:
        """Take one optimizer step over as many micro-batches as make a batch.

        Returns:
            Whether a process was asked to stop, and whether a checkpoint is due; the same in all processes.
        """
        position, steps = self.position, self.batch.accumulation_steps
        waited, sums, suspect = 0.0, torch.zeros(2, device=self.device), _Suspect(self.device)
        for index in range(steps):
            waiting = time.perf_counter()
            with record_function("vim: wait for images"):
                images, labels = next(batches)
            waited += time.perf_counter() - waiting
            with self._averaging(last=index == steps - 1):
                place = (position.epoch, self.loaders.order.number(position.updates * steps + index))
                with record_function("vim: forward"):
                    loss, hits = self.task.training_loss(cast(nn.Module, self._train_model), images, labels, place)
                    loss = loss / steps
                with record_function("vim: backward"):
                    self.scaler.scale(loss).backward()
            suspect.add(images, loss)
            sums += torch.stack([loss.detach(), hits.to(loss.dtype)])
        self.scaler.unscale_(self.optimizer)
        # One exchange between the processes and one transfer from the device a step, before the weights change.
        due = self.processes.is_main and self._save_clock.is_due(position.step + 1)
        unreadable = self.loaders.train_unreadable.take()
        own = torch.tensor([waited, unreadable, self._stop.made, due], dtype=torch.float32, device=self.device)
        shared = self.processes.sum(torch.cat([sums, own]))
        norm = gradient_norm(self.model)
        loss_sum, hits_sum, waited, unreadable, stop, save, grad_norm = torch.cat([shared, norm[None].float()]).tolist()
        mean_loss = loss_sum / self.processes.size
        meter.waited += waited / self.processes.size
        meter.unreadable += round(unreadable)
        if math.isfinite(mean_loss) and math.isfinite(grad_norm):
            clip_gradients(self.model, self.config.optim, norm)
            self.scaler.step(self.optimizer)
            if self.ema is not None:
                self.ema.update(self.model)
            position.skipped_in_a_row = 0
            meter.add(self.config.batch_size, mean_loss, hits_sum, grad_norm)
        else:
            self._skip_step(mean_loss, grad_norm, suspect, meter, reporter)
        self.scaler.update()
        self.optimizer.zero_grad()
        position.step += 1
        position.updates += 1
        return [stop > 0, save > 0]

    def _averaging(self, last: bool) -> AbstractContextManager[Any]:
        """Return a context in which the processes average their gradients after the last micro-batch only."""
        if last or not isinstance(self._parallel, DistributedDataParallel):
            return nullcontext()
        return self._parallel.no_sync()

    def _skip_step(
        self, loss: float, grad_norm: float, suspect: "_Suspect", meter: EpochMeter, reporter: Reporter
    ) -> None:
        """Leave the weights as they are, in all processes, say which tensor was bad first, and stop after too many."""
        position, config = self.position, self.config
        position.skipped_in_a_row += 1
        meter.skipped += 1
        where = (
            f"at step {position.step + 1} of {config.epochs * self.updates_per_epoch}, in epoch {position.epoch + 1}, "
            f"at a learning rate of {self.optimizer.param_groups[0]['lr']:.3g}"
        )
        words = f"{describe_nonfinite(loss, grad_norm)} {where}"
        scale = self.scaler.get_scale()
        if self.scaler.is_enabled() and math.isfinite(loss):
            words += f", where float16 overflowed at a loss scale of {scale:g}"
        stops = position.skipped_in_a_row >= config.max_skipped_steps
        if position.skipped_in_a_row == 1 or stops:
            bad = first_bad_tensor(self.model, suspect.images, self.task.autocast)
            found = [(rank, tensor) for rank, tensor in enumerate(self.processes.gather(bad)) if tensor is not None]
            if found:
                rank, tensor = found[0]
                words += f"; the first bad tensor is {tensor}" + (
                    "" if len(found) == self.processes.size else f" in process {rank}"
                )
                stops = stops or tensor.kind == "parameter"  # no later step can heal it
        if stops:
            raise NonFiniteError(
                f"{words}; the last {position.skipped_in_a_row} steps were not taken, and {CHECKPOINT_FROM_BEFORE}"
            )
        reporter.line(f"step skipped: {words}")

    def _evaluate(self) -> tuple[EvalResult, EvalResult | None]:
        """Evaluate the weights, and the averaged weights if there are any."""
        modules = [self.model] + ([self.ema.module] if self.ema is not None else [])
        results = []
        for module in modules:
            self.processes.share_buffers(module)
            result = evaluate(module, self.loaders.val, self.task.autocast, self.processes, lambda: self._stop.made)
            unreadable = sum(self.processes.gather(self.loaders.val_unreadable.take()))
            expected = len(self.loaders.sets.val) - unreadable
            if result.count != expected:
                raise RuntimeError(
                    f"evaluation counted {result.count} images, of which the held-out set has {expected} that can be "
                    "read"
                )
            results.append(result)
        return results[0], results[1] if len(results) > 1 else None

    def _save_epoch(self, raw: EvalResult, averaged: EvalResult | None) -> None:
        """Write the last checkpoint, and the best one if this epoch is it."""
        position = self.position
        weights, result = _better(self.config.best_by, raw, averaged)
        figures = {"epoch": position.epoch, "weights": weights, "top1": result.top1, "loss": result.loss}
        best = position.best
        improved = best is None or (result.top1, -result.loss) > (best["top1"], -best["loss"])
        if improved:
            position.best = figures
        contents = {"epoch": position.epoch, "weights": weights, "figures": figures, **capture_weights(self)}
        self._check_weights()
        if improved and self.processes.is_main:
            save_checkpoint(self.folder.best, contents)
            chosen = contents["model_ema" if weights == "ema" else "model"]
            save_weights(self.folder.best_weights, chosen, weights_metadata(self.config, self.loaders.class_names))
        self._write_last(contents)

    def _save_within_epoch(self, meter: EpochMeter) -> None:
        """Write the last checkpoint in the middle of an epoch."""
        self.position.meter = meter.state()
        best = self.position.best
        weights = best["weights"] if best is not None else "raw"
        self._write_last({"epoch": self.position.epoch, "weights": weights, "figures": None, **capture_weights(self)})

    def _save_and_stop(self, meter: EpochMeter) -> NoReturn:
        self._save_within_epoch(meter)
        raise RunStopped(f"stopped by SIGTERM after step {self.position.step}, and saved")

    def _write_last(self, contents: dict[str, Any]) -> None:
        self._check_weights()
        contents = contents | capture_rest(self)
        if self.processes.is_main:
            save_checkpoint(self.folder.last, contents)
        self._save_clock.restart()

    def _check_weights(self) -> None:
        """Keep weights that are not finite out of the checkpoints."""
        bad = bad_parameter(self.model)
        if bad is not None:
            raise NonFiniteError(f"{bad} is not finite after step {self.position.step}, and {CHECKPOINT_FROM_BEFORE}")

    def _draw_curves(self, last: bool) -> None:
        """Draw the curves at the end, and before it not more often than is worth the time."""
        if last or time.monotonic() - self._curves_drawn > _CURVES_INTERVAL:
            draw_curves(self.position.history, self.folder.curves, f"{self.config.recipe}: {self.config.model.name}")
            self._curves_drawn = time.monotonic()

    def _describe(self) -> list[str]:
        """Say what the run is about to do, with what the settings resolve to."""
        config, position, batch = self.config, self.position, self.batch
        count = f" in {self.processes.size} processes" if self.processes.size > 1 else ""
        factors = [self.processes.size, batch.accumulation_steps, batch.micro_batch_size]
        product = " x ".join(str(factor) for factor in factors if factor > 1)
        split = f" = {product}" if batch.micro_batch_size < config.batch_size else ""
        carried_on = f"carried on after step {position.step}" if position.step else "new"
        learning = self._freezer.learning(position.epoch)
        frozen = sum(parameter.numel() for parameter in self.model.parameters()) - learning
        learning_words = f", of which {learning:,} numbers learn" if frozen else ""
        return [
            f"run      {self.folder.path} ({carried_on})",
            f"model    {describe_model(self.model, config.model)}{learning_words}",
            *describe_data(config, self.loaders.sets, self._contents),
            *self._changes,
            f"training {config.epochs} epochs of {self.updates_per_epoch} steps, batch {config.batch_size}{split}, "
            f"{config.optim.name} at learning rate {config.peak_lr:g}, {config.precision} on {self.device}{count}",
        ]


class _Suspect:
    """The micro-batch of a step to look at when the step goes wrong: the first with a bad loss, else the last."""

    def __init__(self, device: torch.device) -> None:
        self.images = torch.empty(0, device=device)
        self._bad = torch.zeros((), dtype=torch.bool, device=device)

    def add(self, images: Tensor, loss: Tensor) -> None:
        """Take the next micro-batch into account, without waiting for the device."""
        if len(self.images):
            images = torch.where(self._bad, self.images, images)
        self.images = images
        self._bad = self._bad | ~loss.detach().isfinite()


def _better(best_by: str, raw: EvalResult, averaged: EvalResult | None) -> tuple[str, EvalResult]:
    """Return which weights an epoch is judged by, and their figures."""
    if averaged is None or best_by == "raw":
        return "raw", raw
    if best_by == "ema":
        return "ema", averaged
    return max([("raw", raw), ("ema", averaged)], key=lambda choice: (choice[1].top1, -choice[1].loss))
