"""Compiles kernels of `csrc/` into a library; here also what the CPU's is made of, one for every processor of its kind.

A library lies in `<cache>/<sources, flags, torch and architecture>/<compilers>/`. It is built in a folder of its own
and moved into place, so whatever lies there is complete. One process builds at a time: the others wait for a lock that
the operating system releases when its holder ends, however that happens.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

LIBRARY = "libvimamba.so"
# The last bytes of a complete library: loading one that a full disk or a crash cut short would end the process.
_SEAL = b"\0vimamba: complete"
# Seconds after which a compiler is taken for stuck, and a process that waits for another's build goes without.
COMPILE_TIMEOUT = 300.0
LOCK_TIMEOUT = 600.0
# Compilers at a time: one takes up to half a gigabyte.
_COMPILERS = max(2, min(8, (os.cpu_count() or 2) // 2))

# -ffast-math is wrong here: it cancels the rounding that range reduction relies on.
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
    """The library cannot be built; the message says why and what helps."""


@dataclass(frozen=True)
class Unit:
    """One object file: its name, the source in `csrc/`, and its flags."""

    name: str
    source: str
    flags: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What one library is made of.

    Attributes:
        library: Its file name.
        folders: Folders of `csrc/` whose files decide what it is.
        units: Its object files.
        compilers: Command for each kind of source, by suffix; empty where one is missing.
        missing: What to say then.
        link: Libraries to link with, beyond those of torch that every library needs.
        target_flags: Flags of ".cu" sources that the library's name tells and its folder does not.
    """

    library: str
    folders: tuple[str, ...]
    units: tuple[Unit, ...]
    compilers: dict[str, list[str]]
    missing: str = ""
    link: tuple[str, ...] = ()
    target_flags: tuple[str, ...] = ()


def find_sources() -> Path | None:
    """`csrc/`: inside the package in a wheel, beside it in a repository."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "cpu" / "kernels.cpp").is_file():
            return folder
    return None


def find_compiler() -> list[str] | None:
    """Command of the C++ compiler: $CXX, else the first of g++, clang++ and c++ that exists."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for command in [wanted] if wanted else [["g++"], ["clang++"], ["c++"]]:
        path = shutil.which(command[0])
        if path is not None:
            return [path, *command[1:]]
    return None


def cpu_recipe() -> Recipe:
    """The kernels once per instruction set, each in a namespace of its own, and their bindings."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    sets = _INSTRUCTION_SETS if x86 else {"baseline": ()}
    kernels = [
        Unit(f"kernels_{name}", "cpu/kernels.cpp", (*_KERNEL_FLAGS, f"-DVIM_ISA={name}", *flags))
        for name, flags in sets.items()
    ]
    bindings = [
        Unit(f"bind_{name}", f"cpu/bind_{name}.cpp", BINDING_FLAGS)
        for name in ("scan", "conv", "norm", "product", "block")
    ]
    others = [Unit(name, f"cpu/{name}.cpp", (*_FLAGS, "-O2")) for name in ("dispatch", "pool", "processors")]
    compiler = find_compiler()
    return Recipe(
        library=LIBRARY,
        folders=("common", "cpu"),
        units=(*kernels, *bindings, *others),
        compilers={} if compiler is None else {".cpp": compiler},
        missing=no_compiler(),
        link=("-pthread",),  # a part of the C library only from glibc 2.34 on
    )


def no_compiler() -> str:
    """What to say where there is no C++ compiler."""
    wanted = os.environ.get("CXX")
    what = f"the compiler CXX={wanted} does not exist" if wanted else "there is no C++ compiler"
    return f"{what}; install one (for example `apt install g++`), then run `python -m vim.build`"


def source_key(sources: Path, recipe: Recipe) -> str:
    """Hash of everything that decides what the library is, except the compilers and what its name tells."""
    digest = hashlib.sha256()
    for path in sorted(p for folder in recipe.folders for p in (sources / folder).iterdir() if p.is_file()):
        digest.update(f"{path.relative_to(sources)}\0".encode() + path.read_bytes() + b"\0")
    version = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    for part in (repr(recipe.units), repr(recipe.link), version, platform.machine(), sys.platform):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]


def compiler_key(compilers: dict[str, list[str]]) -> str:
    """Hash of the compilers' files and arguments. Asking for versions would take longer than loading a library."""
    identity = []
    for suffix, command in sorted(compilers.items()):
        path = Path(command[0]).resolve()
        status = path.stat()
        identity.append((suffix, str(path), status.st_size, status.st_mtime_ns, command[1:]))
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:12]


def cache_folders() -> list[Path]:
    """Where libraries are looked for, the first being preferred: $VIM_CACHE_DIR or the user's cache, then a private
    folder among the temporary files.
    """
    chosen = os.environ.get("VIM_CACHE_DIR")
    if chosen:
        first = Path(chosen).expanduser()
    else:
        first = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache")).expanduser() / "vimamba"
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return [first, Path(tempfile.gettempdir()) / f"vimamba-{user}"]


def find_library(recipe: Recipe) -> Path | None:
    """A library that is built already, by today's compilers or, where there are none, by whichever built one."""
    return next(find_libraries(recipe, recipe.library), None)


def find_libraries(recipe: Recipe, pattern: str) -> Iterator[Path]:
    """The libraries of this recipe's sources whose file names match, those in the preferred cache first."""
    sources = find_sources()
    if sources is None:
        return
    key = source_key(sources, recipe)
    name = compiler_key(recipe.compilers) if recipe.compilers else "*"
    for folder in cache_folders():
        with contextlib.suppress(OSError):
            yield from (
                p for p in sorted((folder / key).glob(f"{name}/{pattern}")) if is_complete(p) and _is_ours(p.parent)
            )


def build(recipe: Recipe, report: Report, force: bool = False) -> Path:
    """Build the library, unless another process has done so meanwhile, and return where it is.

    Args:
        recipe: What it is made of.
        report: Takes lines about the progress.
        force: Build even where there is a library.

    Raises:
        BuildError: It cannot be built; the message says why and what helps.
    """
    if sys.platform == "win32":
        raise BuildError("the kernels are not built on Windows; use WSL")
    sources = find_sources()
    if sources is None:
        raise BuildError("the sources of the kernels, csrc/, were not installed; reinstall vimamba")
    if not recipe.compilers:
        raise BuildError(recipe.missing)
    folder = _writable_folder(source_key(sources, recipe))
    target = folder / compiler_key(recipe.compilers) / recipe.library
    with _locked(folder / "lock", report):
        if force or not is_complete(target):
            _build_aside(sources, recipe, target, report)
    return target


def compile_library(sources: Path, recipe: Recipe, folder: Path, report: Report) -> Path:
    """Compile and link in `folder`.

    Raises:
        BuildError: A compiler failed; the message holds the first lines of what it said.
    """
    torch_folder = Path(torch.__file__).parent

    def compile_unit(unit: Unit) -> str:
        suffix, target = Path(unit.source).suffix, str(folder / f"{unit.name}.o")
        flags = recipe.target_flags if suffix == ".cu" else (f"-isystem{torch_folder / 'include'}",)
        _run(
            [*recipe.compilers[suffix], *unit.flags, *flags, "-c", str(sources / unit.source), "-o", target],
            folder,
        )
        report(f"compiled {unit.name}")
        return target

    with ThreadPoolExecutor(_COMPILERS) as pool:
        objects = list(pool.map(compile_unit, recipe.units))
    library = folder / recipe.library
    libraries = [f"-L{torch_folder / 'lib'}", *recipe.link, "-ltorch_cpu", "-lc10"]
    # nvcc, where there is one, knows its own libraries.
    linker = recipe.compilers.get(".cu", recipe.compilers[".cpp"])
    _run([*linker, "-shared", "-o", str(library), *objects, *libraries], folder)
    with open(library, "ab") as file:
        file.write(_SEAL)
        file.flush()
        os.fsync(file.fileno())
    return library


def is_complete(library: Path) -> bool:
    """Whether the library is there to its last byte."""
    try:
        with open(library, "rb") as file:
            file.seek(-len(_SEAL), os.SEEK_END)
            return file.read() == _SEAL
    except OSError:
        return False


def _build_aside(sources: Path, recipe: Recipe, target: Path, report: Report) -> None:
    folder = target.parent.parent
    for leftover in folder.glob("build-*"):  # of builds that were killed: the lock is ours
        shutil.rmtree(leftover, ignore_errors=True)
    start = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as aside:
            library = compile_library(sources, recipe, Path(aside), report)
            target.parent.mkdir(mode=0o700, exist_ok=True)
            os.replace(library, target)
    except OSError as error:
        raise BuildError(f"cannot write to {folder}: {error}; free space or set VIM_CACHE_DIR") from error
    report(f"built {target} in {time.monotonic() - start:.0f} s")


def _run(command: list[str], folder: Path) -> None:
    """Run a compiler to its end or its time limit, with all that it starts."""
    # A session of its own, so that the limit ends the compiler proper too and not just its driver.
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


def _writable_folder(key: str) -> Path:
    problems = []
    for folder in cache_folders():
        path = folder / key
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_ours(path):
                problems.append(f"{path} belongs to another user")
                continue
            with tempfile.TemporaryFile(dir=path):
                return path
        except OSError as error:
            problems.append(str(error))
    raise BuildError(f"no folder to build in: {'; '.join(problems)}; set VIM_CACHE_DIR to one that can be written")


def _is_ours(folder: Path) -> bool:
    """Whether nobody but us (and root) could have put a library there."""
    if not hasattr(os, "getuid"):
        return True
    status = folder.stat()
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & stat.S_IWOTH


@contextlib.contextmanager
def _locked(path: Path, report: Report) -> Iterator[None]:
    """Hold the lock of `path`; the kernel frees it when its holder dies.

    Raises:
        BuildError: Another process holds it for longer than LOCK_TIMEOUT.
    """
    import fcntl  # not on Windows, where nothing is built

    with open(path, "w") as file:
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
            except OSError:  # a file system without locks: os.replace alone keeps a library whole
                break
        yield
