"""The training loop of every task: optimizer steps, evaluation, and checkpoints to resume from."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any, NoReturn, cast

import torch
from rich.console import Console
from timm.utils import random_seed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from vim.checkpoints.io import load_checkpoint
from vim.config.load import config_to_dict, flatten
from vim.config.schema import TrainConfig
from vim.data.listing import printable
from vim.inference.evaluation import EvaluationStopped
from vim.models.build import check_sizes, checkpoint_gradients, describe_model
from vim.runtime.agreement import check_agreement, check_weights, run_facts
from vim.runtime.device import resolve_device
from vim.runtime.distributed import Processes
from vim.runtime.precision import autocast, set_matmul_precision
from vim.runtime.preemption import RunStopped, StopRequest
from vim.tasks.registry import open_task
from vim.tasks.task import Batch, Evaluation
from vim.training.freeze import Freezer
from vim.training.metrics import EpochMeter, peak_memory_gib
from vim.training.nonfinite import ADVICE, NonFiniteError, SuspectBatch, describe_nonfinite, first_bad_tensor
from vim.training.optim import Schedule, build_ema, build_optimizer, clip_gradients, gradient_norm
from vim.training.progress import Reporter, describe_epoch, loading_advice
from vim.training.recorder import Recorder
from vim.training.run_folder import RunFolder
from vim.training.run_lock import FolderInUse
from vim.training.saving import Saver
from vim.training.state import Position, RunState
from vim.training.trackers import check_trackers, open_trackers

_CURVES_INTERVAL = 30.0  # seconds between two drawings of the curves


class Trainer:
    """A training run in one of its processes.

    The constructor opens the data and builds the model, and writes nothing; `fit` trains.

    Args:
        config: The settings.
        folder: The folder of the run; the main process writes its files.
        console: The console on which the main process shows progress; `None` is the standard output.
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
        self.task = open_task(config, self.device, self.processes)
        self.updates_per_epoch = self.task.batches_per_epoch // self.batch.accumulation_steps
        self._total_steps = config.total_steps(self.updates_per_epoch)
        self._epochs = -(-self._total_steps // self.updates_per_epoch)  # the last one may be a part of one
        self._found_empty = not folder.last.exists()
        model = self.task.build_model(starting_weights=self._found_empty).to(self.device)
        ema = build_ema(model, config.ema_decay)
        if config.model.grad_checkpointing:
            checkpoint_gradients(model, config.model)
        optimizer = build_optimizer(model, config)
        self._freezer = Freezer(model, config.optim)
        self.schedule = Schedule(optimizer, config, self.updates_per_epoch)
        scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        for shape in sorted({self.task.image_shape(epoch) for epoch in range(self._epochs)}, reverse=True):
            check_sizes(model, shape, config, self.device)
        if self.processes.size > 1:
            random_seed(config.seed, self.processes.rank)  # dropout and mixing differ between processes
        self.state = RunState(config, self.task, model, ema, optimizer, scaler, self.updates_per_epoch, self.processes)
        self._saver = Saver(config, folder, self.task, self.state, self.processes)
        self._changes: list[str] = []
        self._parallel: nn.Module | None = None
        self._train_model: Callable[[Tensor], Tensor] | None = None
        self._stop = StopRequest()
        self._curves_drawn = -math.inf

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self.state.model

    @property
    def position(self) -> Position:
        """The position of the run, with its figures so far."""
        return self.state.position

    def resume(self) -> None:
        """Restore the last checkpoint in the folder of the run; without one, start from the beginning.

        Raises:
            CheckpointError: The checkpoint is damaged, or has another model, other settings or other classes.
            FolderInUse: Another process writes into the run's folder.
        """
        if not self.folder.last.exists():
            return
        with ExitStack() as undo:
            if self.processes.is_main:
                self.folder.lock.acquire()  # before the checkpoint is read: nobody may replace it after that
                undo.callback(self.folder.lock.release)
            self.state.load_state_dict(load_checkpoint(self.folder.last), self.folder.last)
            if self.processes.is_main:
                self._changes = self.task.data_changes(self.folder.images)
            undo.pop_all()

    def fit(self) -> dict[str, Any]:
        """Train until the last epoch.

        Returns:
            The best epoch: `epoch`, `weights` (`raw` or `ema`), and the headline figures of the task.

        Raises:
            Disagreement: The processes were started with different settings, data or weights.
            FolderInUse: Another process writes into the run's folder.
            NonFiniteError: The loss or its gradient was infinite or not a number in too many steps in a row.
            RunStopped: The run received SIGTERM, and has saved a checkpoint.
        """
        config, position = self.config, self.position
        self._check_agreement()
        with (
            self._hold_folder(),
            self._stop.listen(),
            closing(self._open_records()) as recorder,
            Reporter(self._total_steps, position.step, self._console) as reporter,
        ):
            for line in self._describe():
                reporter.line(line)
            while position.epoch < self._epochs:
                row = self._run_epoch(reporter, recorder)
                reporter.line(describe_epoch(row, self._epochs, self.task.describe_epoch(row)))
                for line in loading_advice(row, config.data.workers):
                    reporter.line(line)
                if self.processes.is_main:
                    recorder.write_epoch(position.history)
                    self._draw_curves(last=position.epoch == self._epochs)
        if position.best is None:
            raise RuntimeError("the run has no best epoch, since it has no epochs")
        return position.best

    def example_image(self) -> str:
        """Return the path of a held-out image, for the user to try the model on."""
        samples = sorted(self.folder.samples.glob("*.png"))
        return str(next(iter(samples), None) or self.task.example_image() or "IMAGE")

    def _check_agreement(self) -> None:
        """Compare the settings, data and weights of all processes, which would train on different ones silently."""
        of_process = [
            ("the kind of device", self.device.type),
            ("the epoch to begin in", self.position.epoch),
            ("the step to begin at", self.position.step),
        ]
        check_agreement(self.processes, chain(run_facts(self.config), self.task.facts(), of_process))
        check_weights(self.processes, self.model)

    @contextmanager
    def _hold_folder(self) -> Iterator[None]:
        """Lock the folder of the run against other runs; if the main process cannot, all processes raise."""
        error: FolderInUse | OSError | None = None
        if self.processes.is_main:
            try:
                self.folder.lock.acquire()
                if self._found_empty and self.folder.last.exists():
                    self.folder.lock.release()
                    raise FolderInUse(f"another run has written into {self.folder.path} since this one was started")
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
        """Write the files that a run starts with, and open the records of its figures."""
        if not self.processes.is_main:
            return Recorder(None)
        self.folder.write_start(self.config, self.device)
        self.task.write_data_record(self.folder.images)
        self.task.write_samples(self.folder.samples)
        settings = {
            name: printable(value) if isinstance(value, str) else value
            for name, value in flatten(config_to_dict(self.config)).items()
        }
        trackers = open_trackers(self.config.log.trackers, self.folder.path, settings, self.position.step)
        return Recorder(self.folder.summary, trackers)

    def _run_epoch(self, reporter: Reporter, recorder: Recorder) -> dict[str, Any]:
        """Train for the rest of an epoch, evaluate and save; return the figures of the epoch."""
        position = self.position
        meter = EpochMeter(self.task.sums, position.meter)
        lr = self._train_epoch(meter, reporter, recorder)
        train_seconds = meter.seconds
        if meter.steps == 0:
            raise NonFiniteError(f"no step of epoch {position.epoch + 1} had a finite loss and gradient, and {ADVICE}")
        try:
            raw, averaged = self._evaluate()
        except EvaluationStopped:
            self._save_and_stop(meter)
        training = self.task.training_figures(meter.task_sums, meter.images)
        row = meter.row(train_seconds, peak_memory_gib(self.device), training, raw, averaged)
        position.epoch, position.updates, position.meter = position.epoch + 1, 0, None
        row = {"epoch": position.epoch, "step": position.step, "lr": lr, **row}
        position.history.append(row)
        self._saver.save_epoch(raw, averaged)
        return row

    def _train_epoch(self, meter: EpochMeter, reporter: Reporter, recorder: Recorder) -> float:
        """Take the remaining optimizer steps of an epoch; return the learning rate of the last one."""
        position = self.position
        self._begin_epoch()
        batches = self.task.batches(position.epoch, position.updates * self.batch.accumulation_steps)
        lr = self.schedule.set(position.epoch, max(0, position.step - 1))
        words = f"epoch {position.epoch + 1}/{self._epochs}"
        updates = min(self.updates_per_epoch, self._total_steps - position.epoch * self.updates_per_epoch)
        while position.updates < updates:
            lr = self.schedule.set(position.epoch, position.step)
            stop, save = self._update(batches, meter, reporter)
            reporter.step(words, position.step, self._describe_training(meter))
            if position.step % self.config.log.steps == 0:
                recorder.write_step(meter.last_step() | {"lr": lr}, position.step)
            if stop:
                self._save_and_stop(meter)
            if save:
                self._saver.save_within_epoch(meter)
        return lr

    def _describe_training(self, meter: EpochMeter) -> str:
        figures = self.task.training_figures(meter.task_sums, meter.images)
        speed = meter.images / meter.seconds
        return f"loss {meter.mean_loss:.3f}  {self.task.describe_training(figures)}  {speed:,.0f} images/s"

    def _begin_epoch(self) -> None:
        """Put the model into training mode, and wrap it again if the set of trained parameters has changed."""
        if self._freezer.begin_epoch(self.position.epoch) or self._train_model is None:
            self._parallel = self.processes.parallel(self.model)
            self._train_model = torch.compile(self._parallel) if self.config.compile else self._parallel

    @record_function("vim: step")
    def _update(self, batches: Iterator[Batch], meter: EpochMeter, reporter: Reporter) -> list[bool]:
        """Take one optimizer step over as many micro-batches as make a batch.

        Returns:
            Two flags, the same in all processes: a process was asked to stop, and a checkpoint is due.
        """
        position, steps = self.position, self.batch.accumulation_steps
        waited, suspect = 0.0, SuspectBatch(self.device)
        sums = torch.zeros(1 + len(self.task.sums), device=self.device)  # the loss and the counts of the task
        for index in range(steps):
            waiting = time.perf_counter()
            with record_function("vim: wait for images"):
                batch = next(batches)
            waited += time.perf_counter() - waiting
            with self._averaging(last=index == steps - 1):
                with record_function("vim: forward"):
                    loss, task_sums = self.task.training_loss(cast(nn.Module, self._train_model), batch)
                    loss = loss / steps
                with record_function("vim: backward"):
                    self.state.scaler.scale(loss).backward()
            suspect.add(batch.images, loss)
            sums += torch.cat([loss.detach()[None], task_sums])
        self.state.scaler.unscale_(self.state.optimizer)
        # One exchange between the processes and one transfer from the device a step, before the weights change.
        flags = [waited, self.task.take_unreadable(), self._stop.made, self._saver.is_due()]
        own = torch.tensor(flags, dtype=torch.float32, device=self.device)
        shared = self.processes.sum(torch.cat([sums, own]))
        norm = gradient_norm(self.model)
        loss_sum, *counts, waited, unreadable, stop, save, grad_norm = torch.cat([shared, norm[None].float()]).tolist()
        mean_loss = loss_sum / self.processes.size
        meter.waited += waited / self.processes.size
        meter.unreadable += round(unreadable)
        if math.isfinite(mean_loss) and math.isfinite(grad_norm):
            clip_gradients(self.model, self.config.optim, norm)
            self.state.scaler.step(self.state.optimizer)
            if self.state.ema is not None:
                self.state.ema.update(self.model)
            position.skipped_in_a_row = 0
            meter.add(self.config.batch_size, mean_loss, counts, grad_norm)
        else:
            self._skip_step(mean_loss, grad_norm, suspect, meter, reporter)
        self.state.scaler.update()
        self.state.optimizer.zero_grad()
        position.step += 1
        position.updates += 1
        return [stop > 0, save > 0]

    def _averaging(self, last: bool) -> AbstractContextManager[Any]:
        """Return a context in which the processes average their gradients after the last micro-batch only."""
        if last or not isinstance(self._parallel, DistributedDataParallel):
            return nullcontext()
        return self._parallel.no_sync()

    def _skip_step(
        self, loss: float, grad_norm: float, suspect: SuspectBatch, meter: EpochMeter, reporter: Reporter
    ) -> None:
        """Leave the weights unchanged in all processes, report the first bad tensor, and stop after too many skips."""
        position, config = self.position, self.config
        position.skipped_in_a_row += 1
        meter.skipped += 1
        where = (
            f"at step {position.step + 1} of {self._total_steps}, in epoch {position.epoch + 1}, "
            f"at a learning rate of {self.state.optimizer.param_groups[0]['lr']:.3g}"
        )
        words = f"{describe_nonfinite(loss, grad_norm)} {where}"
        scale = self.state.scaler.get_scale()
        if self.state.scaler.is_enabled() and math.isfinite(loss):
            words += f", where float16 overflowed at a loss scale of {scale:g}"
        stops = position.skipped_in_a_row >= config.max_skipped_steps
        if position.skipped_in_a_row == 1 or stops:
            bad = first_bad_tensor(self.model, suspect.images, partial(autocast, self.device.type, config.precision))
            found = [(rank, tensor) for rank, tensor in enumerate(self.processes.gather(bad)) if tensor is not None]
            if found:
                rank, tensor = found[0]
                words += f"; the first bad tensor is {tensor}" + (
                    "" if len(found) == self.processes.size else f" in process {rank}"
                )
                stops = stops or tensor.kind == "parameter"  # no later step can repair it
        if stops:
            raise NonFiniteError(f"{words}; the last {position.skipped_in_a_row} steps were not taken, and {ADVICE}")
        reporter.line(f"step skipped: {words}")

    def _evaluate(self) -> tuple[Evaluation, Evaluation | None]:
        """Evaluate the weights, and the averaged weights if there are any."""
        modules = [self.model] + ([self.state.ema.module] if self.state.ema is not None else [])
        results = []
        for module in modules:
            self.processes.share_buffers(module)
            results.append(self.task.evaluate(module, self.processes, lambda: self._stop.made))
        return results[0], results[1] if len(results) > 1 else None

    def _save_and_stop(self, meter: EpochMeter) -> NoReturn:
        self._saver.save_within_epoch(meter)
        raise RunStopped(f"stopped by SIGTERM after step {self.position.step}, and saved")

    def _draw_curves(self, last: bool) -> None:
        """Draw the curves at the end, and now and then before it."""
        if last or time.monotonic() - self._curves_drawn > _CURVES_INTERVAL:
            self.task.draw_curves(self.position.history, self.folder.curves)
            self._curves_drawn = time.monotonic()

    def _describe(self) -> list[str]:
        """Return lines about the run: folder, model, data and training."""
        config, position, batch = self.config, self.position, self.batch
        count = f" in {self.processes.size} processes" if self.processes.size > 1 else ""
        factors = [self.processes.size, batch.accumulation_steps, batch.micro_batch_size]
        product = " x ".join(str(factor) for factor in factors if factor > 1)
        split = f" = {product}" if batch.micro_batch_size < config.batch_size else ""
        carried_on = f"carried on after step {position.step}" if position.step else "new"
        learning = self._freezer.learning(position.epoch)
        frozen = sum(parameter.numel() for parameter in self.model.parameters()) - learning
        steps = self._total_steps
        length = f"{self._epochs} epochs of {self.updates_per_epoch} steps"
        length = length if config.max_steps is None else f"{steps:,} steps, {steps / self.updates_per_epoch:.1f} epochs"
        learning_words = f", of which {learning:,} numbers learn" if frozen else ""
        return [
            f"run      {self.folder.path} ({carried_on})",
            f"model    {describe_model(self.model, config.model)}{learning_words}",
            *self.task.describe_data(),
            *self._changes,
            f"training {length}, batch {config.batch_size}{split}, "
            f"{config.optim.name} at learning rate {config.peak_lr:g}, {config.precision} on {self.device}{count}",
        ]
