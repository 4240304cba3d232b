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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from vim.ops.build.private_folders import private_folder

LIBRARY = "libvimamba.so"
# A library ends in this and the hash of all before it: loading one that a full disk, a crash or a bad block of a disk
# has damaged would end the process.
_SEAL = b"\0vimamba: sha256 "
_HASH_BYTES = 32
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
    package = Path(__file__).resolve().parents[2]
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "cpu" / "kernels.cpp").is_file():
            return folder
    return None


def find_compiler() -> list[str] | None:
    """Command of the C++ compiler: $CXX, else the first of g++, clang++ and c++ that exists."""
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
    """The kernels once per instruction set, each in a namespace of its own, and their bindings."""
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
        link=("-pthread",),  # a part of the C library only from glibc 2.34 on
    )


def instruction_sets() -> tuple[str, ...]:
    """Return the names that $VIM_CPU_CAPABILITY may have."""
    return tuple(_INSTRUCTION_SETS)


def no_compiler() -> str:
    """What to say where there is no C++ compiler."""
    wanted = os.environ.get("CXX")
    what = f"the compiler CXX={wanted} does not exist" if wanted else "there is no C++ compiler"
    try:
        shlex.split(wanted or "")
    except ValueError as error:
        what = f"CXX={wanted} is not a command: {error}"
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
    folder among the temporary files, for where the first cannot be written.
    """
    chosen = os.environ.get("VIM_CACHE_DIR") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "vimamba")
    first = os.path.expanduser(chosen)
    # What still begins with "~" leads nowhere; `private_folder` says so.
    folders = [Path(first) if first.startswith("~") else Path(first).absolute()]
    user = os.geteuid() if hasattr(os, "geteuid") else "user"
    with contextlib.suppress(FileNotFoundError):  # no folder for temporary files
        folders.append(Path(tempfile.gettempdir()).absolute() / f"vimamba-{user}")
    return folders


def find_library(recipe: Recipe) -> Path | None:
    """A library that is built already, by today's compilers or, where there are none, by whichever built one."""
    return next(find_libraries(recipe, recipe.library), None)


def find_libraries(recipe: Recipe, pattern: str) -> Iterator[Path]:
    """The libraries of this recipe's sources whose file names match.

    Folders after the first that can be written are not looked into: what is built does not go there.
    """
    sources = find_sources()
    if sources is None:
        return
    key = source_key(sources, recipe)
    name = compiler_key(recipe.compilers) if recipe.compilers else "*"
    for folder in cache_folders():
        with contextlib.suppress(OSError):
            for library in sorted(private_folder(folder / key).glob(f"{name}/{pattern}")):
                with contextlib.suppress(OSError):
                    private_folder(library.parent)
                    if is_complete(library):
                        yield library
        if _can_be_made(folder):
            return


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
    folder = _writable_folder(source_key(sources, recipe), report)
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
    with open(library, "r+b") as file:
        file.write(_SEAL + _hash(file.read()))
        file.flush()
        os.fsync(file.fileno())
    return library


def is_complete(library: Path) -> bool:
    """Whether the library is there to its last byte, and every byte is as it was written."""
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
    for leftover in folder.glob("build-*"):  # of builds that were killed: the lock is ours
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
    """Run a compiler to its end or its time limit, with all that it starts."""
    # A session of its own, so that the limit ends the compiler proper too and not just its driver.
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
    """Whether the folder is private and can be written, made first if it has to be."""
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
    """Hold the lock of `path`; the kernel frees it when its holder dies.

    Raises:
        BuildError: Another process holds it for longer than LOCK_TIMEOUT.
    """
    import fcntl  # not on Windows, where nothing is built

    # Neither emptied, nor followed if it is a link.
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
            except OSError:  # a file system without locks: os.replace alone keeps a library whole
                break
        yield
