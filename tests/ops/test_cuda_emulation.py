"""The emulation that runs the CUDA kernels without a GPU: small kernels with known results, and faults it must see."""

from __future__ import annotations

import pytest

from tests.processes import ROOT, run_command
from vim.ops.build import compilation


@pytest.mark.slow
def test_probe(tmp_path):
    kernels, emulation = ROOT / "csrc" / "cuda", ROOT / "tests" / "cuda"
    compiler = compilation.find_compiler()
    assert compiler is not None
    flags = ("-std=c++17", "-O1", "-Wno-unknown-pragmas", f"-I{kernels}", f"-I{emulation}")
    run_command(*compiler, *flags, "-o", tmp_path / "probe", "-x", "c++", *emulation.glob("emulation*.c*"))
    assert run_command(tmp_path / "probe").count("ok ") == 5 * 11 + 3
