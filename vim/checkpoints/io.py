"""Checkpoint files: written atomically, read without running code.

A file is written under a temporary name, synced to the disk and renamed, so a reader finds the old file or the new one.
Reading verifies the checksums, and then uses torch's `weights_only` loader.
"""

import os
import pickle
import random
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from vim import git_lfs

FORMAT = "vimamba"
FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the reason in one line."""


@contextmanager
def atomic_writer(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a file that replaces `path` atomically, synced to the disk, when the block ends without an error.

    Args:
        path: The file to create or replace; its folder must exist.

    Yields:
        A binary file to write to. After an error the file at `path` is unchanged.

    Raises:
        OSError: The folder is missing or not writable, or the disk is full.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        _sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8, atomically; bytes of file names that are not UTF-8 are escaped, as `\\udce9`."""
    with atomic_writer(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def save_checkpoint(path: str | os.PathLike[str], contents: Mapping[str, Any]) -> None:
    """Write a checkpoint, atomically.

    Args:
        path: The file to create or replace.
        contents: Tensors, numbers, strings, and dicts, lists and tuples of them, as `weights_only` can load.

    Raises:
        OSError: The folder is missing or not writable, or the disk is full.
    """
    try:
        with atomic_writer(path) as file:
            torch.save({"format": FORMAT, "format_version": FORMAT_VERSION, **contents}, file)
    except RuntimeError as error:
        cause = error.__context__  # torch reports a full disk as "unexpected pos"
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint written by `save_checkpoint`.

    Args:
        path: The file to read.

    Returns:
        The contents, with tensors on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is truncated or damaged, holds more than plain data, or is of another program.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no checkpoint {file}")
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError) as error:
        refuse_pointer(file)
        raise CheckpointError(f"{file} is truncated, damaged or not a checkpoint: {error}") from error
    if damaged is not None:
        raise CheckpointError(f"{file} is damaged: the checksum of its entry {damaged!r} is wrong")
    try:
        contents = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file} holds objects other than plain data, and was not loaded") from error
    except (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is a zip file but not a PyTorch checkpoint") from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise CheckpointError(f"{file} was not written by vim.train: it has no format mark {FORMAT!r}")
    if contents.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {contents.get('format_version')}, this library reads {FORMAT_VERSION}"
        )
    return contents


def save_weights(path: str | os.PathLike[str], weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write weights as safetensors, atomically; `timm.create_model(checkpoint_path=...)` loads them.

    Args:
        path: The file to create or replace; its name should end in `.safetensors`.
        weights: A state dict.
        metadata: Strings for the header of the file.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with atomic_writer(path) as file:
        file.write(safetensors_bytes(tensors, metadata=dict(metadata)))


def load_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file.

    Args:
        path: The file to read.

    Returns:
        The state dict, on the CPU, and the strings in the header.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is truncated or not a safetensors file.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no checkpoint {file}")
    try:
        with safe_open(file, framework="pt") as header:
            metadata = dict(header.metadata() or {})
        return load_file(file), metadata
    except SafetensorError as error:
        refuse_pointer(file)
        raise CheckpointError(f"{file} is truncated or not a safetensors file: {error}") from error


def refuse_pointer(path: str | os.PathLike[str]) -> None:
    """Raise `CheckpointError` if a file is a pointer that Git LFS has not replaced by the checkpoint."""
    if git_lfs.is_pointer_file(path):
        raise CheckpointError(f"{path} cannot be read: {git_lfs.POINTER}")


def load_into(module: nn.Module, weights: Mapping[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Copy weights into a module; names and shapes must match exactly.

    Args:
        module: The module that receives the weights.
        weights: A state dict of the same architecture.
        source: File of the weights, for error messages.

    Raises:
        CheckpointError: A weight is missing, unexpected or of another shape; the message names the first.
    """
    own = module.state_dict()
    odd = next((name for name, tensor in weights.items() if not isinstance(tensor, Tensor)), None)
    if odd is not None:
        raise CheckpointError(
            f"{source} does not fit the model: {odd!r} must be a tensor, got {type(weights[odd]).__name__}"
        )
    for name, tensor in own.items():
        if name not in weights:
            raise CheckpointError(f"{source} does not fit the model: it lacks {name!r}")
        if weights[name].shape != tensor.shape:
            raise CheckpointError(
                f"{source} does not fit the model: {name!r} has shape {tuple(weights[name].shape)}, "
                f"the model's has {tuple(tensor.shape)}"
            )
    left_over = [name for name in weights if name not in own]
    if left_over:
        raise CheckpointError(f"{source} does not fit the model: it has {left_over[0]!r}, which the model lacks")
    module.load_state_dict(dict(weights))


def rng_state() -> dict[str, Any]:
    """Return the state of the global random generators: Python, NumPy, torch and its GPUs."""
    numpy_state: Any = np.random.get_state()
    kind, keys, position, has_gauss, cached = numpy_state
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore a state that `rng_state` returned; states of GPUs only if their number is the same."""
    random.setstate(state["python"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    devices = state.get("cuda", [])
    if torch.cuda.is_available() and len(devices) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(devices)


def _sync_folder(folder: Path) -> None:
    """Sync a folder, so that a renamed file survives a power failure; Windows does not support it."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
