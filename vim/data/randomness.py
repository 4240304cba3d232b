"""Random draws that depend on the position in a run, and not on earlier draws."""

import enum
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


class Draw(enum.IntEnum):
    """Purpose of a draw; it is part of the key, so that different purposes draw different numbers."""

    ORDER = 1
    CROP = 2
    AUGMENTATION = 3
    REPLACEMENT = 4
    ERASING = 5
    MIXING = 6
    SAMPLING = 7


def generator_for(purpose: Draw, *key: int) -> torch.Generator:
    """Return a CPU generator whose draws are a function of the purpose and of these non-negative integers."""
    return torch.Generator().manual_seed(_seeds(purpose, *key)[0])


@contextmanager
def seeded(purpose: Draw, *key: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch within the block, and restore their states after it.

    Draws in the block are a function of the arguments alone. Draws outside are not affected.

    Args:
        purpose: Purpose of the draws in the block.
        key: Non-negative integers, such as the run's seed, the epoch and the position in it.
        device: Also seed the generator of this GPU.
    """
    generators = [torch.default_generator, *_generators_of(device)]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    states = [generator.get_state() for generator in generators]
    for_torch, for_numpy, for_python = _seeds(purpose, *key)
    random.seed(for_python)
    np.random.seed(for_numpy % 2**32)
    for generator in generators:
        generator.manual_seed(for_torch)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _seeds(*key: int) -> list[int]:
    """Hash the key into three 63-bit seeds."""
    return [int(word) >> 1 for word in np.random.SeedSequence(key).generate_state(3, np.uint64)]


def _generators_of(device: torch.device | None) -> list[torch.Generator]:
    if device is None or device.type != "cuda":
        return []
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.cuda.default_generators[index]]
