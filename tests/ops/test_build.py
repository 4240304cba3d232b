"""Finding and building the native library, whatever happens to the build. A false compiler keeps the tests short."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import resource
import shutil
import signal
import stat
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import vim.ops
from tests.processes import Python, run_command, run_python
from vim.ops.backends import native
from vim.ops.backends.registry import isolated_registry
from vim.ops.build import compilation
from vim.ops.build.compilation import LIBRARY, BuildError, cpu_recipe

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing is built on Windows")


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Makes $CXX a script: `body` runs first, then an empty file is written for -o; links are counted in `log`."""

    def make(body: str = "", output: str = ': > "$out"', name: str = "c++") -> Path:
        path = tmp_path / name
        path.write_text(
            "#!/bin/sh\n"
            'for word in "$@"; do [ "$last" = -o ] && out=$word; last=$word; done\n'
            f"{body}\n{output}\n"
            f'case " $* " in *" -shared "*) echo linked >> {tmp_path}/log;; esac\n'
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CXX", str(path))
        return path

    return make


def build(report: compilation.Report, force: bool = False) -> Path:
    return compilation.build(cpu_recipe(), report, force)


def find_library() -> Path | None:
    return compilation.find_library(cpu_recipe())


def _links(tmp_path: Path) -> int:
    log = tmp_path / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def _quiet(line: str) -> None:
    pass


# Runs a build without the rest of the package.
BUILD = "from vim.ops.build import compilation; print(compilation.build(compilation.cpu_recipe(), print))"
# Calls an op and says what it ran on.
CALL = (
    "import logging, sys; logging.basicConfig(stream=sys.stderr, format='LOG %(levelname)s %(message)s')\n"
    "import torch, vim.ops\n"
    "from vim.ops.backends import native\n"
    "y = vim.ops.causal_conv1d(torch.ones(1, 2, 3), torch.ones(2, 4))\n"
    "y = vim.ops.add_rms_norm(torch.ones(1, 3), None, torch.ones(3))\n"
    "print('native' if native.cpu.path else 'reference')\n"
)


def _processor_time() -> float:
    """Return what processes that have ended took, which other programs do not change."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
def test_a_real_build_takes_less_than_a_minute(cache):
    """The whole way: nothing cached, the compiler of this machine, then the library in use."""
    if compilation.find_compiler() is None:
        pytest.skip("no C++ compiler")
    start = _processor_time()
    printed = run_command(sys.executable, "-m", "vim.build")
    assert _processor_time() - start < 120, "more than a minute of two processors"
    path = Path(printed.splitlines()[-1])
    assert path == find_library()
    assert path.is_relative_to(cache)
    assert [p.name for p in path.parents[1].glob("build-*")] == []
    out, err = Python("-c", CALL).communicate()
    assert (out.strip(), "LOG" in err) == ("native", False), err


def test_switched_off(cache):
    out, err = Python("-c", CALL, VIM_NATIVE="0").communicate()
    assert (out.strip(), "LOG" in err) == ("reference", False), err
    assert not cache.exists()


def test_what_is_built_is_found_and_not_built_again(cache, compiler, tmp_path):
    compiler()
    assert find_library() is None
    path = build(_quiet)
    assert path == find_library() == build(_quiet)
    assert _links(tmp_path) == 1
    assert build(_quiet, force=True) == path
    assert _links(tmp_path) == 2


def test_another_compiler_or_source_is_another_library(cache, compiler, tmp_path, monkeypatch):
    compiler()
    first = build(_quiet)
    compiler(name="other")
    second = build(_quiet)
    assert first != second
    changed = tmp_path / "csrc"
    for folder in ("common", "cpu"):
        (changed / folder).mkdir(parents=True)
    (changed / "cpu" / "kernels.cpp").write_text("")
    monkeypatch.setattr(compilation, "find_sources", lambda: changed)
    assert find_library() is None
    assert build(_quiet).parents[1] != first.parents[1]


def test_a_library_is_used_where_the_compiler_is_gone(cache, compiler, monkeypatch):
    compiler()
    path = build(_quiet)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert find_library() == path


def test_a_library_built_elsewhere_is_used_with_any_compiler_and_torch(cache, compiler, tmp_path, monkeypatch):
    compiler()
    kept = compilation.keep_prebuilt(build(_quiet), cpu_recipe(), tmp_path / "prebuilt")
    monkeypatch.setenv("VIM_CACHE_DIR", str(tmp_path / "another cache"))
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    compiler(name="another")
    assert find_library() is None
    monkeypatch.setenv("VIM_PREBUILT", str(tmp_path / "prebuilt"))
    assert find_library() == kept
    kept.chmod(0o777)
    assert find_library() is None, "others could have changed it"


def test_a_library_built_elsewhere_from_other_sources_is_not_used(cache, compiler, tmp_path, monkeypatch):
    compiler()
    compilation.keep_prebuilt(build(_quiet), cpu_recipe(), tmp_path / "prebuilt")
    monkeypatch.setenv("VIM_PREBUILT", str(tmp_path / "prebuilt"))
    changed = tmp_path / "csrc"
    for folder in ("common", "cpu"):
        (changed / folder).mkdir(parents=True)
    (changed / "cpu" / "kernels.cpp").write_text("")
    monkeypatch.setattr(compilation, "find_sources", lambda: changed)
    assert find_library() is None


def _wait_for_the_build(cache: Path) -> None:
    deadline = time.monotonic() + 120
    while not list(cache.glob("*/build-*/")):
        assert time.monotonic() < deadline, "the build has not begun"
        time.sleep(0.05)


def test_a_killed_build_blocks_nobody(cache, compiler, tmp_path):
    compiler("sleep 60", name="slow")
    process = Python("-c", BUILD)
    _wait_for_the_build(cache)
    process.process.kill()
    process.communicate()
    compiler()
    start = time.monotonic()
    assert build(_quiet).is_file()
    assert time.monotonic() - start < 10
    assert not list(cache.glob("*/build-*")), "what it left is cleared away"


@pytest.mark.slow
def test_two_processes_build_once(cache, compiler, tmp_path):
    compiler("sleep 0.3")
    processes = [Python("-c", BUILD) for _ in range(2)]
    outputs = [process.communicate() for process in processes]
    paths = {out.splitlines()[-1] for out, _ in outputs}
    assert len(paths) == 1, outputs
    assert _links(tmp_path) == 1


def test_two_threads_build_once(cache, compiler, tmp_path):
    compiler("sleep 0.1")
    lines: list[str] = []
    threads = [threading.Thread(target=build, args=(lines.append,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _links(tmp_path) == 1
    assert "another process is building; waiting for it" in lines


def test_a_lock_left_behind_is_no_lock(cache, compiler):
    compiler()
    folder = cache / compilation.source_key(compilation.find_sources(), cpu_recipe())
    folder.mkdir(parents=True)
    (folder / "lock").write_text("12345")
    assert build(_quiet).is_file()


def test_waiting_ends(cache, compiler, monkeypatch):
    compiler()
    folder = cache / compilation.source_key(compilation.find_sources(), cpu_recipe())
    folder.mkdir(parents=True)
    monkeypatch.setattr(compilation, "LOCK_TIMEOUT", 0.3)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BuildError, match=r"another process has held .*lock"):
            build(_quiet)


def test_a_stuck_compiler_is_ended_with_all_it_started(cache, compiler, tmp_path, monkeypatch):
    compiler(f"sleep 61 & echo $! >> {tmp_path}/children; wait")
    monkeypatch.setattr(compilation, "COMPILE_TIMEOUT", 0.5)
    start = time.monotonic()
    with pytest.raises(BuildError, match=r"took longer than .* s"):
        build(_quiet)
    assert time.monotonic() - start < 30
    time.sleep(0.2)
    for child in (tmp_path / "children").read_text().split():
        state = Path(f"/proc/{child}/stat")
        assert not state.exists() or state.read_text().split()[2] == "Z"
    assert not list(cache.glob("*/build-*"))


@pytest.mark.parametrize("place", ["below a file", "nowhere"])
def test_a_cache_that_cannot_be_written(place, tmp_path, compiler, monkeypatch):
    """As in a read-only home. The private folder among the temporary files serves instead, if it can be written."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    compiler()
    monkeypatch.setenv("VIM_CACHE_DIR", str(blocked / "cache"))
    temporary = tmp_path / "tmp" if place == "below a file" else blocked
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    if place == "nowhere":
        with pytest.raises(BuildError, match=r"no folder to build in: .*; set VIM_CACHE_DIR"):
            build(_quiet)
        return
    path = build(_quiet)
    assert path.is_relative_to(temporary)
    assert stat.S_IMODE(path.parents[1].stat().st_mode) == 0o700
    assert find_library() == path


def test_folders_for_temporary_files_are_for_where_the_cache_cannot_be_written(cache, compiler, tmp_path, monkeypatch):
    """Anybody may have made a folder of that name."""
    compiler()
    monkeypatch.setenv("VIM_CACHE_DIR", str(compilation.cache_folders()[1]))
    other = build(_quiet)
    monkeypatch.setenv("VIM_CACHE_DIR", str(cache))
    assert find_library() is None
    assert build(_quiet).is_relative_to(cache)
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("VIM_CACHE_DIR", str(blocked / "cache"))
    assert find_library() == other


def test_a_lock_is_neither_emptied_nor_followed(cache, compiler, tmp_path):
    compiler()
    folder = build(_quiet).parents[1]
    precious = tmp_path / "precious"
    precious.write_text("letters")
    (folder / "lock").unlink()
    (folder / "lock").symlink_to(precious)
    (folder / "build-link").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(OSError, match="lock"):
        build(_quiet, force=True)
    (folder / "lock").unlink()
    build(_quiet, force=True)
    assert precious.read_text() == "letters"


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"VIM_CACHE_DIR": "~nobody-of-that-name/x"}, None),
        ({"VIM_CACHE_DIR": "", "XDG_CACHE_HOME": "", "HOME": None}, None),
        ({"CXX": "g++ 'open"}, "CXX=g\\+\\+ 'open is not a command: No closing quotation; install one"),
        ({"VIM_CPU_CAPABILITY": "avx"}, "VIM_CPU_CAPABILITY must be one of baseline, avx2, .*, got 'avx'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_make_no_sense(environment, reason, cache, compiler, fresh, monkeypatch, caplog):
    """The next backend runs, and the reason is said once, in words."""
    compiler(output='echo "error: boom"; exit 1')
    monkeypatch.setattr("pwd.getpwuid", _no_user)
    for name, value in environment.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING):
        vim.ops.causal_conv1d(torch.ones(1, 2, 9), torch.ones(2, 4))
    (message,) = (r.getMessage() for r in caplog.records if not r.getMessage().startswith("compiling"))
    assert re.search(f"backend 'native' is not used on cpu: .*{reason or 'boom'}", message)


def _no_user(uid: int) -> None:
    raise KeyError(uid)


def test_no_home_and_no_temporary_files(compiler, monkeypatch):
    compiler()
    monkeypatch.setenv("VIM_CACHE_DIR", "~nobody-of-that-name")
    monkeypatch.setattr("tempfile.gettempdir", _no_folder)
    with pytest.raises(BuildError, match=r"no folder to build in: ~nobody-of-that-name.* begins with a home folder"):
        build(_quiet)


def _no_folder() -> str:
    raise FileNotFoundError("No usable temporary directory found")


@pytest.mark.slow
def test_an_empty_capability_is_none():
    """For the library too, which reads the variable itself."""
    assert native.load() is None
    code = "from vim.ops.backends import native; print(native.load(), native.capability())"
    assert run_python("-c", code, VIM_CPU_CAPABILITY="").split() == ["None", native.capability()]


def test_relative_folders_and_compilers(compiler, tmp_path, monkeypatch):
    path = compiler()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIM_CACHE_DIR", "here")
    monkeypatch.setenv("CXX", f"./{path.name}")
    assert build(_quiet).is_relative_to(tmp_path / "here")
    assert find_library() is not None


def test_a_compiler_that_does_not_start(cache, tmp_path, monkeypatch):
    path = tmp_path / "c++"
    path.write_bytes(b"\x7fELF of another machine")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    with pytest.raises(BuildError, match=r"c\+\+ does not start: Exec format error; CXX chooses another compiler"):
        build(_quiet)


@pytest.mark.parametrize("change", ["mode", "owner", "link"])
def test_a_library_that_others_can_write_is_not_trusted(cache, compiler, change, tmp_path):
    compiler()
    before = os.umask(0)
    try:
        path = build(_quiet)
    finally:
        os.umask(before)
    assert find_library() == path
    if change == "mode":
        path.chmod(0o777)
    elif change == "link":
        path.rename(tmp_path / "elsewhere.so")
        path.symlink_to(tmp_path / "elsewhere.so")
    elif os.geteuid() == 0:
        os.chown(path, 23456, -1)
    else:
        pytest.skip("only root gives files to other users")
    assert find_library() is None


def test_a_program_that_is_not_a_compiler(cache, compiler):
    compiler(output="exit 0")
    with pytest.raises(BuildError, match=r"c\+\+ is not a compiler: it made no library; CXX chooses another compiler"):
        build(_quiet)


def test_a_folder_that_others_can_write_is_not_trusted(cache, compiler):
    compiler()
    path = build(_quiet)
    path.parent.chmod(0o777)
    assert find_library() is None


def test_no_compiler(cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="CXX=no-such-compiler does not exist; install one"):
        build(_quiet)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BuildError, match="there is no C\\+\\+ compiler; install one"):
        build(_quiet)


def test_an_error_of_the_compiler_is_shown(cache, compiler):
    compiler('echo "note: nothing"; echo "kernels.cpp:1: error: boom"; exit 1')
    with pytest.raises(
        BuildError, match=r"failed \(1\): kernels.cpp:1: error: boom; `python -m vim.build` tries again"
    ):
        build(_quiet)
    assert not list(cache.glob(f"*/*/{LIBRARY}"))
    assert not list(cache.glob("*/build-*"))


def test_a_broken_source(cache, tmp_path, monkeypatch):
    """With the real compiler, so that its words are the ones shown."""
    real = compilation.find_compiler()
    if real is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "common").mkdir()
    (tmp_path / "csrc" / "cpu" / "dispatch.cpp").write_text("int broken( {}\n")
    monkeypatch.setattr(compilation, "find_sources", lambda: tmp_path / "csrc")
    recipe = replace(cpu_recipe(), units=(compilation.Unit("dispatch", "cpu/dispatch.cpp", ("-O1",)),))
    with pytest.raises(BuildError, match=r"dispatch\.cpp:1:.*error"):
        compilation.build(recipe, _quiet)


def test_a_full_disk(cache, compiler, monkeypatch):
    compiler()

    def replace(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(BuildError, match=r"cannot write to .*No space left on device.*set VIM_CACHE_DIR"):
            build(_quiet)
    assert find_library() is None


@pytest.fixture
def fresh(monkeypatch):
    """The native backend as in a new process."""
    monkeypatch.setattr(native, "cpu", native.NativeLibrary())
    with isolated_registry():
        yield


@pytest.mark.parametrize("what", ["no compiler", "error", "no library"])
def test_a_failure_is_one_warning_and_the_reference_path(what, cache, compiler, fresh, monkeypatch, caplog):
    if what == "no compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    else:
        compiler("echo 'error: boom'; exit 1" if what == "error" else "")
    x, weight = torch.randn(1, 2, 9), torch.randn(2, 4)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            y = vim.ops.causal_conv1d(x, weight)
            vim.ops.add_rms_norm(torch.ones(1, 3), None, torch.ones(3))
    torch.testing.assert_close(y, vim.ops.causal_conv1d(x, weight, backend="reference"))
    *compiling, warning = [r.getMessage() for r in caplog.records]
    assert [line.split(":")[0] for line in compiling] == (
        [] if what == "no compiler" else ["compiling the CPU kernels, once, in 10 to 60 seconds"]
    )
    assert warning.startswith("backend 'native' is not used on cpu: ")
    with pytest.raises(RuntimeError, match="backend 'native' cannot run causal_conv1d"):
        vim.ops.causal_conv1d(x, weight, backend="native")


def test_float64_and_other_devices_are_no_news(caplog):
    with caplog.at_level(logging.WARNING):
        vim.ops.causal_conv1d(torch.ones(1, 2, 3).double(), torch.ones(2, 4).double())
        vim.ops.causal_conv1d(torch.ones(1, 2, 3, device="meta"), torch.ones(2, 4, device="meta"))
    assert not caplog.records


@pytest.fixture
def real_library():
    """The library that this machine's compiler makes."""
    reason = native.load()
    if reason is not None:
        pytest.skip(f"no native library: {reason}")
    return native.library_path()


def test_a_library_built_elsewhere_that_does_not_load_is_replaced_once(real_library, cache, compiler, tmp_path):
    """Every process tries it, finds the one that was built in its place, and builds nothing."""
    compiler()
    compilation.keep_prebuilt(build(_quiet), cpu_recipe(), tmp_path / "prebuilt")  # an empty file
    compiler(output=f'cp {real_library} "$out"', name="good")
    for said in (True, False):
        out, err = Python("-c", CALL, VIM_PREBUILT=str(tmp_path / "prebuilt")).communicate()
        assert (out.strip(), "cannot be loaded" in err) == ("native", said), err
    assert _links(tmp_path) == 2


@pytest.mark.parametrize("damage", [pytest.param("cut short", marks=pytest.mark.slow), "a lost block"])
def test_a_damaged_library_is_built_again(damage, real_library, cache, compiler):
    """A disk that lost what it had said it wrote."""
    compiler(output=f'cp {real_library} "$out"')
    path = build(_quiet)
    contents = path.read_bytes()
    half = len(contents) // 2
    path.write_bytes(
        contents[:1000] if damage == "cut short" else contents[:half] + bytes(512) + contents[half + 512 :]
    )
    assert find_library() is None
    out, err = Python("-c", CALL).communicate()
    assert out.strip() == "native", err
    assert "LOG WARNING compiling the CPU kernels" in err
    assert find_library() == path


@pytest.fixture
def packaged(cache, compiler, fresh, tmp_path, monkeypatch):
    """A library where a wheel has it; nothing is loaded, since a process can load the real one only once."""
    compiler()
    monkeypatch.setattr(compilation, "PACKAGED", tmp_path / "_lib")
    path = compilation.PACKAGED / compilation.source_key(compilation.find_sources(), cpu_recipe()) / LIBRARY
    path.parent.mkdir(parents=True)
    shutil.copy(build(_quiet), path)
    shutil.rmtree(cache)
    monkeypatch.setattr(torch.ops, "load_library", lambda library: None)
    return path


def test_the_library_of_a_wheel_needs_no_compiler_and_no_cache(packaged, cache, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert native.load() is None
    assert native.cpu.path == packaged
    assert not cache.exists()
    assert not caplog.records


@pytest.mark.parametrize("problem", ["other sources", "damaged", "another system"])
def test_a_library_of_a_wheel_that_does_not_fit_is_compiled_again(problem, packaged, cache, monkeypatch, caplog):
    """And a line says why."""
    words = {
        "other sources": f"{packaged} was built from other sources than {compilation.find_sources()}",
        "damaged": f"{packaged} is damaged",
        "another system": f"{packaged} cannot be loaded: GLIBC_2.99 not found",
    }
    if problem == "other sources":
        monkeypatch.setattr(compilation, "source_key", lambda sources, recipe: "other")
    elif problem == "damaged":
        packaged.write_bytes(packaged.read_bytes()[:-1])
    else:
        monkeypatch.setattr(torch.ops, "load_library", lambda library: _refuse(library, packaged))
    with caplog.at_level(logging.WARNING):
        assert native.load() is None
    (record,) = caplog.records
    assert record.getMessage() == f"compiling the CPU kernels, once, in 10 to 60 seconds: {words[problem]}"
    assert native.cpu.path.is_relative_to(cache)


def _refuse(library: Path, refused: Path) -> None:
    """Fail for one library, as one that was linked with a newer C library does."""
    if library == refused:
        raise OSError("GLIBC_2.99 not found")


def test_a_build_of_more_than_a_few_seconds_shows_progress(packaged, monkeypatch, caplog):
    packaged.unlink()
    monkeypatch.setattr(native, "_PROGRESS_INTERVAL", 0.0)
    with caplog.at_level(logging.WARNING):
        assert native.load() is None
    files = len(cpu_recipe().units)
    lines = [r.getMessage() for r in caplog.records[1:]]
    assert [line.rpartition(", ")[2] for line in lines[:-1]] == [f"{i} of {files} files" for i in range(1, files + 1)]
    assert lines[-1].startswith("built ")


def test_interrupted_by_the_user(cache, compiler):
    compiler("sleep 1")
    process = Python("-c", BUILD)
    _wait_for_the_build(cache)
    os.kill(process.process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode not in (None, 0)
    assert not list(cache.glob("*/build-*"))
