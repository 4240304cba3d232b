"""Finding, building and loading the CUDA library; what a GPU would show is made up where there is none."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.backends import chosen_op
from tests.processes import run_command, run_python
from vim import build as build_command
from vim.ops import unavailable_backends
from vim.ops.backends import native
from vim.ops.backends.registry import isolated_registry
from vim.ops.build import compilation, cuda_recipe
from vim.ops.build.compilation import BuildError

OPS = ["add_rms_norm", "bidirectional_conv1d", "bidirectional_scan", "causal_conv1d", "selective_scan"]


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Scripts in place of g++ and nvcc that write what was asked of them to `log` and an empty file for -o."""

    def make(nvcc: str = "") -> Path:
        for path, body in ((tmp_path / "c++", ""), (tmp_path / "toolkit" / "bin" / "nvcc", nvcc)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                "#!/bin/sh\n"
                'for word in "$@"; do [ "$last" = -o ] && out=$word; last=$word; done\n'
                f'echo "$0 $*" >> {tmp_path}/log\n{body}\n: > "$out"\n'
            )
            path.chmod(0o755)
        monkeypatch.setenv("CXX", str(tmp_path / "c++"))
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
        return tmp_path / "log"

    return make


@pytest.fixture
def gpu(monkeypatch):
    """As if torch saw a GPU of architecture 9.0, in a new process without Triton."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_recipe, "visible_architectures", lambda: ((9, 0),))
    monkeypatch.setattr(native, "cuda", native.CUDALibrary())
    with isolated_registry({"native", "reference"}):
        yield


def _quiet(line: str) -> None:
    pass


def _build(*architectures: tuple[int, int]) -> Path:
    return compilation.build(cuda_recipe.recipe(architectures), _quiet)


def _no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_recipe, "find_nvcc", lambda: None)


def test_nvcc_is_the_toolkits_own_and_not_a_link_to_it(tmp_path, monkeypatch):
    real = tmp_path / "cuda-13" / "bin" / "nvcc"
    link = tmp_path / "bin" / "nvcc"
    for path in (real, link):
        path.parent.mkdir(parents=True)
    real.write_text("#!/bin/sh\n")
    real.chmod(0o755)
    link.symlink_to(real)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(link.parent))
    assert cuda_recipe.find_nvcc() == real
    other = tmp_path / "other" / "bin" / "nvcc"
    other.parent.mkdir(parents=True)
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "other"))
    assert cuda_recipe.find_nvcc() == other
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert cuda_recipe.find_nvcc() == real, "a wrong CUDA_HOME does not hide a compiler"


def test_code_for_each_architecture_and_ptx_of_the_last(cache, tools):
    log = tools()
    path = _build((9, 0), (8, 0), (9, 0))
    assert path.name == "libvimamba_cuda_sm80_sm90.so"
    kernels = [line for line in log.read_text().splitlines() if "/nvcc " in line and " -c " in line]
    assert {Path(line.split(" -c ")[1].split()[0]).stem for line in kernels} >= {"conv", "norm", "self_check"}
    for line in kernels:
        for target in ("code=sm_80", "code=sm_90", "arch=compute_90,code=compute_90"):
            assert line.count(target) == 1
        assert "torch" not in line.split(" -c ")[0], "kernels know nothing of torch"
    (link,) = [line for line in log.read_text().splitlines() if " -shared " in line]
    assert "-cudart=static" in link, "the toolkit need not be the one that torch was built with"


@pytest.mark.parametrize(
    ("built", "wanted", "serves"),
    [
        ([(8, 0), (9, 0)], [(8, 0)], True),
        ([(8, 0), (9, 0)], [(8, 9)], True),  # code of 8.0 runs on all of the generation
        ([(8, 6)], [(8, 0)], False),
        ([(9, 0)], [(8, 0)], False),
        ([(8, 0)], [(9, 0)], True),  # through PTX
        ([(8, 0), (9, 0)], [(12, 0)], True),
        ([(8, 0)], [(8, 0), (9, 0)], True),
        ([(9, 0)], [(8, 0), (9, 0)], False),
    ],
)
def test_which_library_serves_which_gpu(built, wanted, serves, cache, tools):
    tools()
    path = _build(*built)
    assert cuda_recipe.find_library(wanted) == (path if serves else None)


def test_code_is_preferred_to_ptx(cache, tools):
    tools()
    _build((8, 0))
    exact = _build((9, 0))
    assert cuda_recipe.find_library([(9, 0)]) == exact


def test_a_library_is_found_where_nvcc_is_gone(cache, tools, monkeypatch):
    tools()
    path = _build((8, 0), (9, 0))
    _no_nvcc(monkeypatch)
    assert cuda_recipe.find_library([(9, 0)]) == path


def test_an_old_gpu_and_a_torch_without_cuda(monkeypatch):
    with pytest.raises(BuildError, match=r"architecture 7\.5; the kernels need 8\.0 or newer"):
        cuda_recipe.recipe([(7, 5), (9, 0)])
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BuildError, match="this PyTorch was built without CUDA"):
        cuda_recipe.recipe([(9, 0)])


@pytest.mark.parametrize("what", ["no nvcc", "error", "no library"])
def test_a_failure_is_one_warning_and_the_next_backend(what, cache, tools, gpu, monkeypatch, caplog):
    tools("echo 'conv.cu(1): error: boom'; exit 2" if what == "error" else "")
    if what == "no nvcc":
        _no_nvcc(monkeypatch)
    with caplog.at_level(logging.WARNING, "vim"):
        for _ in range(2):
            for op in OPS:
                for dtype in (torch.float32, torch.float64):
                    assert chosen_op(op, None, "cuda", dtype) is getattr(torch.ops.vim, op).default
    building, warning = [r.getMessage() for r in caplog.records][:-1], caplog.records[-1].getMessage()
    assert [line.split(":")[0] for line in building] == (
        [] if what == "no nvcc" else ["compiling the CUDA kernels, once, in one to three minutes"]
    )
    assert warning.startswith("backend 'native' is not used on cuda: ")
    words = {
        "no nvcc": "no CUDA compiler, nvcc",
        "error": r"nvcc failed (2): conv.cu(1): error: boom",
        "no library": ".so",
    }
    assert words[what] in warning
    with pytest.raises(RuntimeError, match="backend 'native' cannot run add_rms_norm on cuda"):
        chosen_op("add_rms_norm", "native", "cuda")


def test_kernels_that_cannot_run_are_bypassed(cache, tools, gpu, monkeypatch, caplog):
    """A library that loads and then does not fit the driver stays attached: the reference must not go through it."""
    tools()
    _build((9, 0))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(native.CUDALibrary, "runs", lambda self, op: True)
    monkeypatch.setattr(cuda_recipe, "problem", lambda path: "H100: CUDA driver version is insufficient")
    with caplog.at_level(logging.WARNING, "vim"):
        for dtype in (torch.float32, torch.float64):
            assert chosen_op("add_rms_norm", None, "cuda", dtype) is torch.ops.vim.add_rms_norm_reference.default
    assert "cannot run here: H100: CUDA driver version is insufficient" in caplog.text
    assert len(caplog.records) == 1


def test_without_a_gpu_nothing_is_tried(cache, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING, "vim"):
        reason = unavailable_backends("add_rms_norm", "cuda")["native"]
    assert reason == "torch finds no GPU"
    assert not caplog.records
    assert not cache.exists()


@pytest.mark.parametrize("text", ["9.0", "90", "sm_90"])
def test_architectures_are_parsed(text):
    assert cuda_recipe.parse_architecture(text) == (9, 0)
    assert cuda_recipe.parse_architecture("12.0") == (12, 0)


@pytest.mark.parametrize(("text", "message"), [("hopper", "written like 9.0, got 'hopper'"), ("7.5", "8.0 or newer")])
def test_architectures_that_are_none(text, message, capsys):
    with pytest.raises(ValueError, match=message):
        cuda_recipe.parse_architecture(text)
    with pytest.raises(SystemExit):
        build_command.main(["--cuda", text])
    assert message in capsys.readouterr().err


def test_the_build_command(cache, tools, capsys, monkeypatch):
    tools()
    monkeypatch.setattr(cuda_recipe, "visible_architectures", lambda: ())
    for arguments, library in (
        (["--cuda"], "libvimamba_cuda_sm80_sm90.so"),
        (["--cuda", "8.0"], "libvimamba_cuda_sm80.so"),
    ):
        assert build_command.main(arguments) == 0
        printed = capsys.readouterr().out.splitlines()
        assert Path(printed[-1]).name == library
        assert any(Path(line).name == compilation.LIBRARY for line in printed)
    _no_nvcc(monkeypatch)
    assert build_command.main(["--force", "--cuda", "9.0"]) == 1
    assert "there is no CUDA compiler, nvcc; install the CUDA toolkit or set CUDA_HOME" in capsys.readouterr().err


def test_libraries_for_another_machine(cache, tools, gpu, tmp_path, monkeypatch, capsys):
    tools()
    assert build_command.main(["--cuda", "9.0", "--into", str(tmp_path / "prebuilt")]) == 0
    kept = [Path(line) for line in capsys.readouterr().out.splitlines()[-1:]]
    monkeypatch.setenv("VIM_CACHE_DIR", str(tmp_path / "another cache"))
    _no_nvcc(monkeypatch)
    assert list(native.cuda.found()) == []
    monkeypatch.setenv("VIM_PREBUILT", str(tmp_path / "prebuilt"))
    assert list(native.cuda.found()) == kept
    assert kept[0].name == "libvimamba_cuda_sm90.so"


# Loads a library and says which ops have a kernel for GPUs, and what the library says of this machine.
LOAD = (
    "import ctypes, sys, torch, vim.ops\n"
    "torch.ops.load_library(sys.argv[1])\n"
    "from vim.ops.backends import native; from vim.ops.build import cuda_recipe\n"
    "print([op for op in sys.argv[2:] if native.cuda.runs(op)])\n"
    "ask = ctypes.CDLL(sys.argv[1]).vim_cuda_problem\n"
    "ask.restype = ctypes.c_char_p\n"
    "print(ask())\n"
)


def test_ccache_is_not_the_host_compiler(tools, tmp_path, monkeypatch):
    """nvcc cannot run it: it asks the host compiler for its properties by options that ccache does not take."""
    tools()
    ccache = tmp_path / "ccache"
    ccache.write_text("#!/bin/sh\n")
    ccache.chmod(0o755)
    monkeypatch.setenv("CXX", f"{ccache} g++")
    assert cuda_recipe.recipe([(9, 0)]).compilers[".cu"][1] == "-ccbin=g++"


@pytest.mark.slow
@pytest.mark.parametrize("binding", ["block", "conv", "norm", "scan"])
def test_a_binding_includes_no_header_of_the_kernels(binding):
    """Which only nvcc compiles, or a C++ compiler with the tests' emulation on its include path."""
    compiler = compilation.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    include = f"-isystem{Path(torch.__file__).parent / 'include'}"
    source = compilation.find_sources() / "cuda" / f"bind_{binding}.cpp"
    run_command(*compiler, *compilation.BINDING_FLAGS, include, "-fsyntax-only", str(source))


@pytest.mark.slow
def test_a_real_library_of_the_norm_loads_without_a_gpu(cache):
    """The real compilers, on the smallest kernels: one file takes a few seconds, all of them a minute or more."""
    recipe = cuda_recipe.recipe([(8, 0)])
    recipe = replace(recipe, units=tuple(u for u in recipe.units if u.name in ("norm", "bind_norm", "self_check")))
    if cuda_recipe.find_nvcc() is None:
        with pytest.raises(BuildError, match="there is no CUDA compiler, nvcc"):
            compilation.build(recipe, _quiet)
        return
    path = compilation.build(recipe, _quiet)
    printed = run_python("-c", LOAD, path, *OPS, CUDA_VISIBLE_DEVICES="")
    attached, problem = printed.splitlines()
    assert attached == "['add_rms_norm']"
    assert "no CUDA-capable device" in problem or "driver" in problem
