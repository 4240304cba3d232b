"""Several processes that train one model: torchrun starts them, and this is how they meet."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_T = TypeVar("_T")


class JoinError(ValueError):
    """The processes of a run cannot meet; the message says why, in one line."""


class Refused(ValueError):
    """What was asked for cannot be done, in one of the processes at least; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """The processes of a run, as one of them sees them; alone by default.

    Every method must be called by all of them, in the same order.
    """

    rank: int = 0
    """Number of this process among all."""
    local_rank: int = 0
    """Number of this process among those of its machine; its GPU has the same number."""
    size: int = 1
    """How many there are."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
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
        """Do something in all processes; if it fails in one it fails in all, for else the others would wait for it.

        Raises:
            Refused: It failed in some process.
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
        """Give every process the main one's buffers, such as the running averages of batch normalisation."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def parallel(self, model: nn.Module) -> nn.Module:
        """Return the model, which averages its gradients over all processes if there are several."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=True)


@contextmanager
def join_processes() -> Iterator[Processes]:
    """Meet the other processes that torchrun started, and part from them when the block ends; alone without torchrun.

    Raises:
        JoinError: What torchrun tells its processes is missing or wrong, or the others do not come.
    """
    size = _number("WORLD_SIZE", default=1)
    if size == 1 or not dist.is_available():
        yield Processes()
        return
    local_rank = _number("LOCAL_RANK")
    if torch.cuda.is_available() and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    try:
        store, rank, size = next(dist.rendezvous("env://"))
        # torchrun keeps its store when it starts the processes once more, and in it the addresses of those that died,
        # which gloo would wait for.
        attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} of {size} processes"
        # Without a name of a backend: gloo for tensors on a CPU, NCCL for those on a GPU.
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


def _number(name: str, default: int | None = None) -> int:
    """Return a number that torchrun has put into the environment."""
    text = os.environ.get(name, None if default is None else str(default))
    if text is None:
        size = os.environ.get("WORLD_SIZE")
        raise JoinError(f"{name} is not set, but WORLD_SIZE is {size}: start the processes with torchrun")
    if not text.strip().isdecimal():
        raise JoinError(f"{name} must be a number, got {text!r}: start the processes with torchrun")
    return int(text)
