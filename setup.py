"""Puts the kernels' sources into the package and, where they can be compiled, the libraries.

$VIM_BUILD_NATIVE says whether a wheel, or an installation from source, compiles:

    auto  compile where there are a compiler and torch, which is also looked for in the environment that pip installs
          into; otherwise say in one line why not, and the kernels are compiled at their first use (the default)
    1     compile, with torch as a requirement of the build, or fail
    cuda  the same, with the CUDA library beside the CPU's
    0     compile nothing: a wheel for every platform

An editable installation compiles into the user's cache. One library serves every Python and every torch from 2.10 on.
"""

import importlib
import importlib.util
import os
import shutil
import site
import sys
import sysconfig
import types
from functools import cached_property
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
CHOICES = ("auto", "0", "1", "cuda")
CHOICE = os.environ.get("VIM_BUILD_NATIVE") or "auto"
if CHOICE not in CHOICES:
    raise SystemExit(f"VIM_BUILD_NATIVE must be one of {', '.join(CHOICES)}, got {CHOICE!r}")


def _find_torch() -> bool:
    if importlib.util.find_spec("torch") is None:  # pip hides the environment that it installs into
        for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
            site.addsitedir(folder)
    return importlib.util.find_spec("torch") is not None


def _import_build(name: str) -> types.ModuleType:
    """Import a module of vim/ops/build/ without the packages around it, which need more than torch."""
    for package in ("vim", "vim.ops", "vim.ops.build"):
        if package not in sys.modules:
            module = sys.modules[package] = types.ModuleType(package)
            module.__path__ = [str(ROOT.joinpath(*package.split(".")))]
    return importlib.import_module(f"vim.ops.build.{name}")


def _compile() -> dict[str, Path]:
    """Return the compiled libraries by their paths in the package."""
    compilation = _import_build("compilation")
    recipes = [compilation.cpu_recipe()]
    if CHOICE == "cuda":
        cuda_recipe = _import_build("cuda_recipe")
        recipes.append(cuda_recipe.recipe(cuda_recipe.DEFAULT_ARCHITECTURES))
    sources = compilation.find_sources()
    return {
        f"_lib/{compilation.source_key(sources, recipe)}/{recipe.library}": compilation.build(recipe, print)
        for recipe in recipes
    }


class _DistributionWithKernels(Distribution):
    @cached_property
    def kernels(self) -> dict[str, Path]:
        """The compiled libraries, by their paths in the package."""
        if CHOICE == "0":
            return {}
        try:
            if not _find_torch():
                raise RuntimeError("torch is not installed where the build can see it")
            return _compile()
        except (RuntimeError, ImportError, OSError) as error:  # a BuildError is a RuntimeError
            if CHOICE != "auto":
                raise SystemExit(f"VIM_BUILD_NATIVE={CHOICE}: {error}") from error
            print(f"vimamba: the kernels are not compiled now but at their first use: {error}")
            return {}

    def has_ext_modules(self) -> bool:
        """Return True if a wheel is for one platform."""
        return "bdist_wheel" in self.commands and bool(self.kernels)


class _BuildWithKernels(build_py):
    def run(self) -> None:
        super().run()
        kernels = self.distribution.kernels
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "vim"
        shutil.rmtree(package / "_lib", ignore_errors=True)  # from an earlier build of other sources
        shutil.copytree(ROOT / "csrc", package / "csrc", dirs_exist_ok=True)
        for path, library in kernels.items():
            (package / path).parent.mkdir(parents=True)
            shutil.copy(library, package / path)


class _Wheel(bdist_wheel):
    def finalize_options(self) -> None:
        super().finalize_options()
        if CHOICE == "cuda":
            self.build_number = "1cuda"  # beside the wheel for the CPU, whose name is otherwise the same

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag of a wheel that no version of Python limits."""
        return "py3", "none", super().get_tag()[2]


setup(
    cmdclass={"build_py": _BuildWithKernels, "bdist_wheel": _Wheel},
    distclass=_DistributionWithKernels,
    setup_requires=["torch>=2.10"] if CHOICE in ("1", "cuda") and not _find_torch() else [],
)
