"""The device that the settings name."""

import torch


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device of the given name; `auto` is a GPU when there is one.

    Args:
        name: As in the setting `device`.
        local_rank: Number of the process on its machine; `auto` and `cuda` give each process a GPU of its own.

    Raises:
        ValueError: There is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps', got {name!r}") from error
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(device.type, False):
        raise ValueError(f"device must be one that PyTorch finds on this machine, got {str(device)!r}")
    return device
