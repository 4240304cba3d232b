"""The emulation that runs the CUDA kernels without a GPU: small kernels with known results, and faults it must see."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from vim.ops.build import compilation

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_probe(tmp_path):
    kernels, emulation = ROOT / "csrc" / "cuda", ROOT / "tests" / "cuda"
    compiler = compilation.find_compiler()
    assert compiler is not None
    subprocess.run(
        [
            *(*compiler, "-std=c++17", "-O1", "-Wno-unknown-pragmas", f"-I{kernels}", f"-I{emulation}"),
            *("-o", str(tmp_path / "probe"), "-x", "c++", *map(str, emulation.glob("emulation*.c*"))),
        ],
        check=True,
    )
    done = subprocess.run([tmp_path / "probe"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("ok ") == 5 * 10 + 2
