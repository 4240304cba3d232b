"""Compilation of the kernels in `csrc/` into a library, and the recipe of the CPU's library.

A wheel may bring a library, at `vim/_lib/<key>/<name>`. The path of a library that is built on this machine is
`<cache>/<key>/<hash of compilers>/<name>`. The key is a hash of the sources, the flags and the architecture, so a
library of other sources is not found. It does not depend on the version of torch: the bindings use torch's stable ABI.

A library is built in a temporary folder and then moved to its path, so a library at its path is complete. One process
builds at a time. The others wait for a lock, which the operating system releases when its holder ends in any way.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from vim.ops.build.private_folders import check_private_file, private_folder

LIBRARY = "libvimamba.so"
_PACKAGE = Path(__file__).resolve().parents[2]
# The libraries that a wheel brings (setup.py).
PACKAGED = _PACKAGE / "_lib"
# A library ends with this seal and the hash of everything before it. Loading a library that a full disk, a crash or a
# bad block damaged would end the process.
_SEAL = b"\0vimamba: sha256 "
_HASH_BYTES = 32
# Seconds after which a compiler counts as stuck, and after which a process stops waiting for another's build.
COMPILE_TIMEOUT = 300.0
LOCK_TIMEOUT = 600.0
# Compilers that run at a time; each takes up to half a gigabyte of memory.
_COMPILERS = max(2, min(8, (os.cpu_count() or 2) // 2))

# No -ffast-math: it removes the rounding that range reduction relies on.
_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wno-psabi")
_KERNEL_FLAGS = (*_FLAGS, "-O3", "-fno-math-errno", "-ffp-contract=fast")
# The stable ABI from torch 2.10 on.
BINDING_FLAGS = (*_FLAGS, "-O1", "-DTORCH_TARGET_VERSION=0x020a000000000000")
_AVX512 = ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512")
_INSTRUCTION_SETS = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": _AVX512,
    "avx512bf16": (*_AVX512, "-mavx512bf16"),
}

Report = Callable[[str], None]


class BuildError(RuntimeError):
    """Error of a build; the message says why the library cannot be built and what helps."""


@dataclass(frozen=True)
class Unit:
    """One object file: its name, the source in `csrc/`, and its flags."""

    name: str
    source: str
    flags: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Description of one library.

    Attributes:
        library: File name.
        folders: Folders of `csrc/` whose files are part of the library's hash.
        units: Object files.
        compilers: Commands by suffix of the source; empty if a compiler is missing.
        missing: The error message for a missing compiler.
        link: Libraries to link with, besides torch's.
        target_flags: Flags of ".cu" sources that are part of the library's name instead of its hash.
    """

    library: str
    folders: tuple[str, ...]
    units: tuple[Unit, ...]
    compilers: dict[str, list[str]]
    missing: str = ""
    link: tuple[str, ...] = ()
    target_flags: tuple[str, ...] = ()


def find_sources() -> Path | None:
    """Return the folder `csrc`: inside the package in a wheel, next to it in a repository; `None` if there is none."""
    for folder in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if (folder / "cpu" / "kernels.cpp").is_file():
            return folder
    return None


def find_compiler() -> list[str] | None:
    """Return the command of the C++ compiler: $CXX, else the first of g++, clang++ and c++ that exists."""
    try:
        wanted = shlex.split(os.environ.get("CXX", ""))
    except ValueError:
        return None
    for command in [wanted] if wanted else [["g++"], ["clang++"], ["c++"]]:
        path = shutil.which(command[0])
        if path is not None:
            return [os.path.abspath(path), *command[1:]]
    return None


def cpu_recipe() -> Recipe:
    """Return the recipe of the CPU's library: kernels per instruction set, in separate namespaces, and bindings."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    sets = _INSTRUCTION_SETS if x86 else {"baseline": ()}
    kernels = [
        Unit(f"kernels_{name}", "cpu/kernels.cpp", (*_KERNEL_FLAGS, f"-DVIM_ISA={name}", *flags))
        for name, flags in sets.items()
    ]
    bindings = [
        Unit(f"bind_{name}", f"cpu/bind_{name}.cpp", BINDING_FLAGS)
        for name in ("scan", "conv", "norm", "product", "block", "embed")
    ]
    others = [Unit(name, f"cpu/{name}.cpp", (*_FLAGS, "-O2")) for name in ("dispatch", "pool", "processors")]
    compiler = find_compiler()
    return Recipe(
        library=LIBRARY,
        folders=("common", "cpu"),
        units=(*kernels, *bindings, *others),
        compilers={} if compiler is None else {".cpp": compiler},
        missing=no_compiler(),
        link=("-pthread",),  # part of the C library from glibc 2.34 on
    )


def instruction_sets() -> tuple[str, ...]:
    """Return the names that $VIM_CPU_CAPABILITY may have."""
    return tuple(_INSTRUCTION_SETS)


def no_compiler() -> str:
    """Return the error message for a missing C++ compiler."""
    wanted = os.environ.get("CXX")
    what = f"the compiler CXX={wanted} does not exist" if wanted else "there is no C++ compiler"
    try:
        shlex.split(wanted or "")
    except ValueError as error:
        what = f"CXX={wanted} is not a command: {error}"
    return f"{what}; install one (for example `apt install g++`), then run `python -m vim.build`"


def source_key(sources: Path, recipe: Recipe) -> str:
    """Return the hash of everything the library depends on, except the compilers and what is in its name."""
    digest = hashlib.sha256()
    for path in sorted(p for folder in recipe.folders for p in (sources / folder).iterdir() if p.is_file()):
        digest.update(f"{path.relative_to(sources)}\0".encode() + path.read_bytes() + b"\0")
    for part in (repr(recipe.units), repr(recipe.link), platform.machine(), sys.platform):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]


def compiler_key(compilers: dict[str, list[str]]) -> str:
    """Return the hash of the compilers' files and arguments; asking for versions would be slower than loading."""
    identity = []
    for suffix, command in sorted(compilers.items()):
        path = Path(command[0]).resolve()
        status = path.stat()
        identity.append((suffix, str(path), status.st_size, status.st_mtime_ns, command[1:]))
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:12]


def cache_folders() -> list[Path]:
    """Return the folders of libraries, in order of preference.

    The first is $VIM_CACHE_DIR or the user's cache. The second is a private folder among the temporary files, for
    machines where the first cannot be written.
    """
    chosen = os.environ.get("VIM_CACHE_DIR") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "vimamba")
    first = os.path.expanduser(chosen)
    # A path that still begins with "~" has no home folder; `private_folder` raises for it.
    folders = [Path(first) if first.startswith("~") else Path(first).absolute()]
    user = os.geteuid() if hasattr(os, "geteuid") else "user"
    with contextlib.suppress(FileNotFoundError):  # no folder for temporary files
        folders.append(Path(tempfile.gettempdir()).absolute() / f"vimamba-{user}")
    return folders


def find_library(recipe: Recipe) -> Path | None:
    """Return the wheel's library, or one built here by the present compilers or, without a compiler, by any."""
    return next(find_libraries(recipe, recipe.library), None)


def find_libraries(recipe: Recipe, pattern: str) -> Iterator[Path]:
    """Yield the libraries of this recipe's sources whose file names match, the wheel's first.

    The search ends at the first folder that can be written, because builds never go to the folders after it.
    """
    sources = find_sources()
    if sources is None:
        return
    key = source_key(sources, recipe)
    yield from filter(is_complete, sorted((PACKAGED / key).glob(pattern)))
    name = compiler_key(recipe.compilers) if recipe.compilers else "*"
    for folder in cache_folders():
        with contextlib.suppress(OSError):
            for library in sorted(private_folder(folder / key).glob(f"{name}/{pattern}")):
                with contextlib.suppress(OSError):
                    private_folder(library.parent)
                    check_private_file(library)
                    if is_complete(library):
                        yield library
        if _can_be_made(folder):
            return


def why_none(recipe: Recipe) -> str:
    """Return in words why no library was found."""
    packaged = sorted(PACKAGED.glob(f"*/{recipe.library}"))
    sources = find_sources()
    if not packaged or sources is None:
        return "this installation came without a library for them"
    if packaged[0].parent.name == source_key(sources, recipe):
        return f"{packaged[0]} is damaged"
    return f"{packaged[0]} was built from other sources than {sources}"


def build(recipe: Recipe, report: Report, force: bool = False) -> Path:
    """Build the library, unless another process has just built it, and return its path.

    Args:
        recipe: Description of the library.
        report: Takes lines about the progress.
        force: Build even if there is a library.

    Raises:
        BuildError: The library cannot be built; the message says why and what helps.
    """
    if sys.platform == "win32":
        raise BuildError("the kernels are not built on Windows; use WSL")
    sources = find_sources()
    if sources is None:
        raise BuildError("the sources of the kernels, csrc/, were not installed; reinstall vimamba")
    if not recipe.compilers:
        raise BuildError(recipe.missing)
    folder = _writable_folder(source_key(sources, recipe), report)
    target = folder / compiler_key(recipe.compilers) / recipe.library
    with _locked(folder / "lock", report):
        if force or not is_complete(target):
            _build_aside(sources, recipe, target, report)
    return target


def compile_library(sources: Path, recipe: Recipe, folder: Path, report: Report) -> Path:
    """Compile and link in `folder`.

    Raises:
        BuildError: A compiler failed; the message has the first lines of its errors.
    """
    torch_folder = Path(torch.__file__).parent
    finished = itertools.count(1)

    def compile_unit(unit: Unit) -> str:
        suffix, target = Path(unit.source).suffix, str(folder / f"{unit.name}.o")
        flags = recipe.target_flags if suffix == ".cu" else (f"-isystem{torch_folder / 'include'}",)
        _run(
            [*recipe.compilers[suffix], *unit.flags, *flags, "-c", str(sources / unit.source), "-o", target],
            folder,
        )
        report(f"compiled {unit.name}, {next(finished)} of {len(recipe.units)} files")
        return target

    with ThreadPoolExecutor(_COMPILERS) as pool:
        objects = list(pool.map(compile_unit, recipe.units))
    library = folder / recipe.library
    libraries = [f"-L{torch_folder / 'lib'}", *recipe.link, "-ltorch_cpu", "-lc10"]
    # nvcc, if the recipe has it, links its own libraries.
    linker = recipe.compilers.get(".cu", recipe.compilers[".cpp"])
    _run([*linker, "-shared", "-o", str(library), *objects, *libraries], folder)
    if not library.is_file():
        raise BuildError(f"{linker[0]} is not a compiler: it made no library; CXX chooses another compiler")
    library.chmod(0o755)  # whatever the umask: a library that others can write is not loaded
    with open(library, "r+b") as file:
        file.write(_SEAL + _hash(file.read()))
        file.flush()
        os.fsync(file.fileno())
    return library


def is_complete(library: Path) -> bool:
    """Return True if the library exists and every byte is as it was written."""
    try:
        contents = library.read_bytes()
    except OSError:
        return False
    code, seal = contents[: -len(_SEAL) - _HASH_BYTES], contents[-len(_SEAL) - _HASH_BYTES :]
    return seal == _SEAL + _hash(code)


def _hash(contents: bytes) -> bytes:
    return hashlib.sha256(contents).digest()


def _build_aside(sources: Path, recipe: Recipe, target: Path, report: Report) -> None:
    folder = target.parent.parent
    for leftover in folder.glob("build-*"):  # from builds that were killed: this process holds the lock
        shutil.rmtree(leftover, ignore_errors=True)
    start = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as aside:
            library = compile_library(sources, recipe, Path(aside), report)
            private_folder(target.parent, create=True)
            os.replace(library, target)
    except OSError as error:
        raise BuildError(f"cannot write to {folder}: {error}; free space or set VIM_CACHE_DIR") from error
    report(f"built {target} in {time.monotonic() - start:.0f} s")


def _run(command: list[str], folder: Path) -> None:
    """Run a compiler to its end, or end it and all its children at the time limit."""
    # In a new session, so that the time limit ends the compiler proper too, not only its driver.
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env={**os.environ, "TMPDIR": str(folder), "LC_ALL": "C"},
        )
    except OSError as error:
        raise BuildError(f"{command[0]} does not start: {error.strerror}; CXX chooses another compiler") from error
    try:
        output, _ = process.communicate(timeout=COMPILE_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took longer than {COMPILE_TIMEOUT:.0f} s") from error
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode != 0:
        lines = [line for line in output.splitlines() if "error" in line.lower()] or output.splitlines()
        reason = " | ".join(line.strip() for line in lines[:2])[:500]
        raise BuildError(
            f"{command[0]} failed ({process.returncode}): {reason}; "
            "`python -m vim.build` tries again, CXX chooses another compiler"
        )


def _can_be_made(folder: Path) -> bool:
    """Return True if the folder is private and can be written; create it if it is missing."""
    try:
        return os.access(private_folder(folder, create=True), os.W_OK | os.X_OK)
    except OSError:
        return False


def _writable_folder(key: str, report: Report) -> Path:
    problems: list[str] = []
    for folder in cache_folders():
        try:
            path = private_folder(folder / key, create=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            problems.append(str(error))
            continue
        if problems:
            report(f"building in {path}: {'; '.join(problems)}")
        return path
    raise BuildError(f"no folder to build in: {'; '.join(problems)}; set VIM_CACHE_DIR to one that can be written")


@contextlib.contextmanager
def _locked(path: Path, report: Report) -> Iterator[None]:
    """Hold the lock of `path`; the operating system releases it when its holder dies.

    Raises:
        BuildError: Another process held the lock for longer than LOCK_TIMEOUT.
    """
    import fcntl  # not on Windows, where nothing is built

    # The flags neither truncate the file nor follow a link.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(descriptor, "r+b") as file:
        deadline, said = time.monotonic() + LOCK_TIMEOUT, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not said:
                    report("another process is building; waiting for it")
                    said = True
                if time.monotonic() > deadline:
                    raise BuildError(f"another process has held {path} for {LOCK_TIMEOUT:.0f} s") from None
                time.sleep(0.1)
            except OSError:  # a file system without locks; os.replace alone keeps a library complete
                break
        yield
