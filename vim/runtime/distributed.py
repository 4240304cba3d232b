"""The processes of a run, started by torchrun, and their communication."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_T = TypeVar("_T")
_RESOLVING = 10.0  # seconds


class JoinError(ValueError):
    """The processes of a run cannot connect; the message gives the reason in one line."""


class Refused(ValueError):
    """An action failed in at least one process; the message gives the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """The processes of a run, and the rank of this one; a single process by default.

    Every method must be called by all of them, in the same order.
    """

    rank: int = 0
    """Number of this process among all."""
    local_rank: int = 0
    """Number of this process on its machine; its GPU has the same number."""
    size: int = 1
    """Number of processes."""

    @property
    def is_main(self) -> bool:
        """True for the process that writes the files and prints messages."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: _T) -> list[_T]:
        """Return the values of all processes, by rank."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: _T) -> _T:
        """Return the value of the main process."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def together(self, action: Callable[[], _T]) -> _T:
        """Run an action in all processes; if it fails in one, raise in all, so that none waits for another.

        Raises:
            Refused: The action failed in some process.
        """
        result, error = None, None
        try:
            result = action()
        except (ValueError, TypeError, OSError, ModuleNotFoundError) as problem:
            error = str(problem)
        errors = [message for message in self.gather(error) if message is not None]
        if errors:
            raise Refused(errors[0])
        return cast(_T, result)

    def share_buffers(self, model: nn.Module) -> None:
        """Copy the buffers of the main process to all, such as the running averages of batch normalisation."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def parallel(self, model: nn.Module) -> nn.Module:
        """Return the model, wrapped to average its gradients over all processes if there are several."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=True)


@contextmanager
def join_processes() -> Iterator[Processes]:
    """Connect to the other processes of torchrun for the time of the block; without torchrun stay alone.

    Raises:
        JoinError: An environment variable of torchrun is missing or wrong, or the processes cannot connect.
    """
    size = _number("WORLD_SIZE", default=1)
    if size == 1 or not dist.is_available():
        yield Processes()
        return
    local_rank = _number("LOCAL_RANK")
    if _number("RANK") >= size:  # the others would wait for the missing one
        raise JoinError(
            f"RANK must be < WORLD_SIZE = {size}, got {os.environ['RANK']}: start the processes with torchrun"
        )
    if torch.cuda.is_available() and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    _check_address()
    try:
        store, rank, size = next(dist.rendezvous("env://"))
        # When torchrun restarts the processes it keeps its store, with the addresses of the dead ones, for which gloo
        # would wait.
        attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} of {size} processes"
        # Without a backend's name: gloo for tensors on a CPU, NCCL for tensors on a GPU.
        dist.init_process_group(store=dist.PrefixStore(attempt, store), rank=rank, world_size=size)
    except (ValueError, RuntimeError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = " ".join(str(error).split())
        raise JoinError(
            f"the {size} processes cannot meet at {where}: {reason}; MASTER_PORT chooses another port, and torchrun's "
            "--standalone any that is free"
        ) from error
    try:
        yield Processes(rank=dist.get_rank(), local_rank=local_rank, size=size)
    finally:
        dist.destroy_process_group()


def _check_address() -> None:
    """Raise unless the name of the main process's machine can be resolved; torch would try for minutes.

    A name may appear a little later, while a cluster starts the machines.
    """
    name = os.environ.get("MASTER_ADDR")
    deadline = time.monotonic() + _RESOLVING
    while name is not None:
        try:
            socket.getaddrinfo(name, None)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline:
                raise JoinError(
                    f"MASTER_ADDR must be the name or address of the machine of process 0, and {name!r} cannot be "
                    f"resolved: {error}"
                ) from error
        time.sleep(min(1.0, _RESOLVING))


def _number(name: str, default: int | None = None) -> int:
    """Return a number from an environment variable that torchrun sets."""
    text = os.environ.get(name, None if default is None else str(default))
    if text is None:
        size = os.environ.get("WORLD_SIZE")
        raise JoinError(f"{name} is not set, but WORLD_SIZE is {size}: start the processes with torchrun")
    if not text.strip().isdecimal():
        raise JoinError(f"{name} must be a number, got {text!r}: start the processes with torchrun")
    return int(text)
