"""What the CUDA compiler makes of the fast scan, where there is one; a GPU is not needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.processes import run_command
from vim.ops.build import compilation

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import sass_counts  # noqa: E402

HAS_NVCC = shutil.which("nvcc") is not None or "CUDA_HOME" in os.environ


@pytest.mark.slow
@pytest.mark.skipif(not HAS_NVCC, reason="no nvcc")
def test_main_loops_of_the_fast_scan():
    assert run_command("bash", "scripts/check_cuda_compiles.sh", "--fast", PYTHON=sys.executable).count("ok ") == 17


def test_without_a_compiler_it_says_so(tmp_path):
    (tmp_path / "bash").symlink_to(shutil.which("bash"))
    (tmp_path / "dirname").symlink_to(shutil.which("dirname"))
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [tmp_path / "bash", ROOT / "scripts/check_cuda_compiles.sh"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "no nvcc" in done.stderr


def test_a_kernel_that_spills_or_reserves_all_barriers_is_found(tmp_path):
    tools = {
        "nvcc": """
if [[ $1 == --dryrun ]]; then echo "#\\$ _HERE_=$(dirname "$0")" >&2; exit; fi
echo "ptxas info : Function properties for _ZN3vim4cuda4goodIfEEvi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info : Used 40 registers, used 0 barriers
ptxas info : Function properties for _ZN3vim4cuda3badIfEEvi
    8 bytes stack frame, 516 bytes spill stores, 12 bytes spill loads
ptxas info : Used 64 registers, used 16 barriers" >&2
touch "${@: -1}"
""",
        "cuobjdump": "",
    }
    (tmp_path / "bin").mkdir()
    for name, script in tools.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}")
        (tmp_path / "bin" / name).chmod(0o755)
    done = subprocess.run(
        ["bash", ROOT / "scripts/check_cuda_compiles.sh", "--fast"],
        env={**os.environ, "CUDA_HOME": str(tmp_path), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    name = "bad<float>(int)" if shutil.which("c++filt") else "_ZN3vim4cuda3badIfEEvi"
    assert f"WRONG fast_scan.90: {name}: 8 bytes of stack, 516 and 12 of spill stores and loads\n" in done.stdout
    assert "good" not in done.stdout
    assert "WRONG fast_scan.90: a kernel reserves 16 barriers\n" in done.stdout


def test_counts_of_a_loop():
    sass = """
        Function : _Z4scan
        /*0000*/                   IMAD R1, R1, R2, R3 ;
        /*0010*/                   LDS.128 R4, [R8] ;
        /*0020*/                   MUFU.EX2 R5, R4 ;
        /*0030*/              @!P0 FFMA R5, R4, R5, R6 ;
        /*0040*/               @P1 BRA 0x10 ;
        /*0050*/                   MUFU.RCP R5, R4 ;
        /*0060*/               @P1 BRA 0x0 ;
        /*0070*/                   BRA 0x70 ;
"""
    (loop,) = sass_counts.main_loops(sass_counts.functions(sass)["_Z4scan"], 1)
    assert (loop["all"], loop["MUFU"], loop["LDS.128"], loop["FFMA"]) == (4, 1, 1, 1)


@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cuda").glob("bind_*.cpp")), ids=lambda p: p.stem)
def test_bindings_compile_without_headers_of_cuda_or_the_emulation(source):
    """As the build compiles them: the emulated library has one folder of headers more."""
    include = f"-isystem{Path(torch.__file__).parent / 'include'}"
    run_command(*compilation.find_compiler(), *compilation.BINDING_FLAGS, include, "-M", source)
