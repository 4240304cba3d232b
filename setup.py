"""Puts the kernels' sources into the package, and the compiled library too where torch is there to build it with.

An isolated `pip install .` has no torch: it makes a pure wheel, and the kernels are built at their first use.
"""

import importlib.util
import shutil
import sys
import types
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
WITH_LIBRARY = importlib.util.find_spec("torch") is not None


class _BuildWithKernels(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "vim"
        shutil.copytree(ROOT / "csrc", package / "csrc", dirs_exist_ok=True)
        if WITH_LIBRARY:
            compilation = _import_compilation()
            (package / "_lib").mkdir(exist_ok=True)
            shutil.copy(compilation.build(compilation.cpu_recipe(), print), package / "_lib")


def _import_compilation():
    """Import vim/ops/build/compilation.py without the packages around it, which need more than torch."""
    for name in ("vim", "vim.ops", "vim.ops.build"):
        package = sys.modules[name] = types.ModuleType(name)
        package.__path__ = [str(ROOT.joinpath(*name.split(".")))]
    return importlib.import_module("vim.ops.build.compilation")


class _WithLibrary(Distribution):
    def has_ext_modules(self):
        return WITH_LIBRARY  # a wheel that holds a library is for one platform


setup(cmdclass={"build_py": _BuildWithKernels}, distclass=_WithLibrary)
