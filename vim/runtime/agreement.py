"""Check that processes which train or evaluate together were started with the same settings, data and weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from vim.config.load import config_to_dict, flatten
from vim.config.schema import TrainConfig
from vim.data.contents import SplitContents
from vim.runtime.distributed import Processes
from vim.version import __version__

# Settings of the machine, which do not change the result.
_MAY_DIFFER = frozenset(
    {"device", "eval_batch_size", "data.path", "data.workers", "data.pin_memory"}
    | {"log.trackers", "log.steps", "log.report", "save.steps", "save.minutes"}
)
_SHOWN = 3
# The same weights drawn on two kinds of processors differ in their last bits.
_WEIGHTS_TOLERANCE = 1e-3


class Disagreement(ValueError):
    """Processes were started differently; the message names each difference, with both values."""


def check_agreement(processes: Processes, facts: Iterable[tuple[str, Any]]) -> None:
    """Compare facts between all processes; every one of them must call it.

    Args:
        processes: The processes. A single one does not look at the facts.
        facts: Names and values.

    Raises:
        Disagreement: A fact differs, in all processes.
    """
    if processes.size == 1:
        return
    everyone = processes.gather(dict(facts))
    _refuse(_differences(everyone, lambda first, other: first == other))


def check_weights(processes: Processes, model: nn.Module) -> None:
    """Compare the weights of a model between all processes; every one of them must call it.

    Raises:
        Disagreement: A weight differs by more than rounding, in all processes.
    """
    if processes.size == 1:
        return
    norms = {
        f"the norm of {name}": float(torch.linalg.vector_norm(tensor.detach().float()))
        for name, tensor in model.state_dict().items()
    }
    everyone = processes.gather(norms)
    _refuse(_differences(everyone, _are_close))


def run_facts(config: TrainConfig) -> Iterator[tuple[str, Any]]:
    """Yield the version and the settings that all processes of a run must share, by name."""
    yield "the version of vimamba", __version__
    for name, value in flatten(config_to_dict(config)).items():
        if name not in _MAY_DIFFER:
            yield name, value


def data_facts(class_names: tuple[str, ...], contents: Mapping[str, SplitContents]) -> Iterator[tuple[str, Any]]:
    """Yield the facts about labelled images that all processes must share, by name.

    Args:
        class_names: Name of each class, in the order of the labels.
        contents: The images of each split, by the name of the split.
    """
    yield "the number of classes", len(class_names)
    for label, name in enumerate(class_names):
        yield f"the name of class {label}", name
    for split, found in contents.items():
        yield f"the number of {split} images", found.count
        for label, checksum in enumerate(found.checksums()):
            yield f"the {split} images of class {label}, {class_names[label]!r}", checksum


def _are_close(first: float, other: float) -> bool:
    return abs(first - other) <= _WEIGHTS_TOLERANCE * max(abs(first), abs(other), _WEIGHTS_TOLERANCE)


def _differences(everyone: list[dict[str, Any]], equal: Callable[[Any, Any], bool]) -> list[str]:
    """Return the facts in which some process differs from the first, in words."""
    first, found = everyone[0], []
    for name in dict.fromkeys(name for facts in everyone for name in facts):
        for rank, facts in enumerate(everyone):
            if name not in facts or name not in first or not equal(first[name], facts[name]):
                values = [repr(side[name]) if name in side else "not there" for side in (first, facts)]
                found.append(f"{name}: {values[0]} in process 0, {values[1]} in process {rank}")
                break
    return found


def _refuse(differences: list[str]) -> None:
    if differences:
        more = f"; and {len(differences) - _SHOWN:,} more" if len(differences) > _SHOWN else ""
        shown = "; ".join(differences[:_SHOWN])
        raise Disagreement(f"all processes must be started alike, and they differ in {shown}{more}")
