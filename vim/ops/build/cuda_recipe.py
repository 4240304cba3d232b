"""The recipe of the CUDA library: nvcc, architectures, and which built library runs on which GPUs.

The kernels (`.cu`) do not use torch and link their CUDA runtime statically. The bindings (`.cpp`) use torch's stable
ABI and no CUDA header. So any nvcc that the driver supports will do, and no other library of the toolkit is needed.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from vim.ops.build.compilation import (
    BINDING_FLAGS,
    BuildError,
    Recipe,
    Unit,
    find_compiler,
    find_libraries,
    find_sources,
    no_compiler,
)

# (major, minor) of a compute capability.
Architecture = tuple[int, int]

# The default without a GPU: these run on every NVIDIA GPU since 2020, on newer ones through the last one's PTX.
DEFAULT_ARCHITECTURES: tuple[Architecture, ...] = ((8, 0), (9, 0))
# The kernels need bfloat16 arithmetic and asynchronous copies to shared memory.
OLDEST: Architecture = (8, 0)

# No --use_fast_math: the kernels call approximate instructions by name where they are accurate enough.
_KERNEL_FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-warn-spills")
_WRAPPERS = ("ccache", "sccache", "distcc")
_PREFIX = "libvimamba_cuda"


def find_nvcc() -> Path | None:
    """Return the real path of nvcc: in $CUDA_HOME or $CUDA_PATH, on the search path, or where toolkits install."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [Path(home) / "bin" / "nvcc" for home in homes if home]
    on_path = shutil.which("nvcc")
    places += [Path(on_path)] if on_path else []
    places.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((place.resolve() for place in places if os.access(place, os.X_OK)), None)


def visible_architectures() -> tuple[Architecture, ...]:
    """Return the architectures of the GPUs that torch sees, without duplicates, the oldest first."""
    return tuple(sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}))


def parse_architecture(text: str) -> Architecture:
    """Return (9, 0) for "9.0", "90" or "sm_90".

    Raises:
        ValueError: The text has another form, or the architecture is older than the kernels support.
    """
    match = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)", text)
    if match is None:
        raise ValueError(f"an architecture is written like 9.0, got {text!r}")
    architecture = (int(match[1]), int(match[2]))
    if architecture < OLDEST:
        raise ValueError(f"the kernels need an architecture of {_text(OLDEST)} or newer, got {_text(architecture)}")
    return architecture


def recipe(architectures: Iterable[Architecture]) -> Recipe:
    """Return the recipe of the CUDA library for these architectures, with PTX for GPUs newer than the last.

    Raises:
        BuildError: This PyTorch has no CUDA, or an architecture is older than the kernels support.
    """
    wanted = sorted(set(architectures))
    if torch.version.cuda is None:
        raise BuildError("this PyTorch was built without CUDA")
    if wanted[0] < OLDEST:
        raise BuildError(f"the GPU has architecture {_text(wanted[0])}; the kernels need {_text(OLDEST)} or newer")
    sources, compiler, nvcc = find_sources(), find_compiler(), find_nvcc()
    numbers = [f"{major}{minor}" for major, minor in wanted]
    targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    targets.append(f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}")
    compilers = {}
    if compiler is not None and nvcc is not None:
        compilers = {".cpp": compiler, ".cu": [str(nvcc), f"-ccbin={_host_compiler(compiler)}"]}
    return Recipe(
        library=f"{_PREFIX}{''.join(f'_sm{n}' for n in numbers)}.so",
        folders=("common", "cuda"),
        units=() if sources is None else tuple(_units(sources)),
        compilers=compilers,
        missing=no_compiler() if compiler is None else _no_nvcc(),
        link=("-cudart=static", "-ltorch_cuda"),
        target_flags=tuple(targets),
    )


def find_library(architectures: Iterable[Architecture]) -> Path | None:
    """Return a library that is already built and runs on all these architectures, if possible without PTX."""
    return next(serving_libraries(architectures), None)


def serving_libraries(architectures: Iterable[Architecture]) -> Iterator[Path]:
    """Yield the libraries that are already built and run on all these architectures, first those without PTX."""
    wanted = tuple(architectures)
    found = list(find_libraries(recipe(wanted), f"{_PREFIX}*.so"))
    exact = [library for library in found if all(_serves(library, one, through_ptx=False) for one in wanted)]
    yield from exact
    for library in found:
        if library not in exact and all(_serves(library, one, through_ptx=True) for one in wanted):
            yield library


def problem(library: Path) -> str | None:
    """Return why the loaded library's kernels cannot run on some GPU that torch sees; `None` if they run on all.

    The library asks for one kernel's attributes, which fails for a driver that is too old or another architecture.
    """
    ask = ctypes.CDLL(str(library)).vim_cuda_problem
    ask.restype = ctypes.c_char_p
    for device in range(torch.cuda.device_count()):
        with torch.cuda.device(device):
            answer = ask()
        if answer is not None:
            return f"{torch.cuda.get_device_name(device)}: {answer.decode()}"
    return None


def _serves(library: Path, architecture: Architecture, through_ptx: bool) -> bool:
    """Return True if it has code for this architecture, or for an older one of the same generation."""
    built = [(int(number[:-1]), int(number[-1])) for number in re.findall(r"_sm(\d+)", library.name)]
    major, minor = architecture
    return any(m == major and n <= minor for m, n in built) or (through_ptx and max(built) <= architecture)


def _units(sources: Path) -> Iterable[Unit]:
    folder = sources / "cuda"
    for path in sorted(folder.glob("*.cu")):
        yield Unit(path.stem, f"cuda/{path.name}", _KERNEL_FLAGS)
    for path in sorted(folder.glob("bind_*.cpp")):
        yield Unit(path.stem, f"cuda/{path.name}", BINDING_FLAGS)


def _host_compiler(command: list[str]) -> str:
    """Return the compiler proper of a command such as `ccache g++`, which nvcc cannot run."""
    return next((word for word in command if Path(word).name not in _WRAPPERS), command[0])


def _no_nvcc() -> str:
    return (
        "there is no CUDA compiler, nvcc; install the CUDA toolkit or set CUDA_HOME to where it is, "
        "then run `python -m vim.build --cuda`"
    )


def _text(architecture: Architecture) -> str:
    return ".".join(map(str, architecture))
