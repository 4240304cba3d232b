"""The backend "emulated": the CUDA kernels of csrc/cuda on the host, built by the C++ compiler, for tests alone."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from vim.ops.backends.registry import Backend, Inapplicable, register_backend
from vim.ops.build import compilation
from vim.ops.common.registration import define_family

SUFFIX = "_emulated"
_SOURCES = Path(__file__).parents[1] / "csrc"
_EMULATION = Path(__file__).parent / "cuda"
# More flags for the compiler and the linker, such as sanitizers (scripts/sanitize.sh)
_EXTRA = tuple(os.environ.get("VIM_EMULATED_FLAGS", "").split())
_FLAGS = (
    *_EXTRA,
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    "-DVIM_EMULATED",
)
_KERNEL_FLAGS = (*_FLAGS, "-O1", "-march=native", "-fno-math-errno", "-ffp-contract=fast")
_BINDING_FLAGS = (*_FLAGS, "-O1", "-DTORCH_TARGET_VERSION=0x020a000000000000")


def register() -> None:
    """Make "emulated" a backend that runs where it is asked for by name; nothing is built before that."""
    define_family(SUFFIX)
    register_backend(Backend("emulated", SUFFIX, _why_not, by_name_only=True))


@functools.cache
def load() -> Path:
    """Build the library, unless an equal one lies in the cache, and attach its kernels."""
    folder = compilation.cache_folders()[0] / f"emulated-{_key()}"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libemulated.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _build(library)
    torch.ops.load_library(library)
    return library


def _why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return Inapplicable("the emulation of the CUDA kernels runs on the host")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return Inapplicable(f"{str(dtype).removeprefix('torch.')} runs on the reference")
    load()
    return None


def _files() -> list[Path]:
    files = [p for folder in ("common", "cuda") for p in (_SOURCES / folder).iterdir()]
    return sorted([*files, *_EMULATION.glob("emulation.*")])


def _key() -> str:
    processor = subprocess.run(
        [*_compiler(), "-march=native", "-Q", "--help=target"], capture_output=True, check=False
    ).stdout
    digest = hashlib.sha256(processor + repr((_KERNEL_FLAGS, _BINDING_FLAGS, torch.__version__, _compiler())).encode())
    for path in _files():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def _compiler() -> list[str]:
    compiler = compilation.find_compiler()
    assert compiler is not None, "the tests need a C++ compiler"
    return compiler


def _build(library: Path) -> None:
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=library.parent) as aside:

        def compile_file(source: Path) -> str:
            flags = _BINDING_FLAGS if source.name.startswith("bind_") else _KERNEL_FLAGS
            target = f"{aside}/{source.name}.o"
            includes = (f"-isystem{torch_folder / 'include'}", f"-I{_EMULATION}", f"-I{_SOURCES / 'cuda'}")
            subprocess.run([*_compiler(), *flags, *includes, "-x", "c++", "-c", source, "-o", target], check=True)
            return target

        sources = [p for p in _files() if p.suffix in (".cu", ".cpp") and p.parent.name == "cuda"]
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_file, sources))
        linked = f"{aside}/libemulated.so"
        libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
        subprocess.run([*_compiler(), *_EXTRA, "-shared", "-o", linked, *objects, *libraries], check=True)
        os.replace(linked, library)
