"""Import of modules named `mamba_ssm` and `causal_conv1d` that hold functions of this library."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from vim.compat.contents import CONTENTS

_logger = logging.getLogger(__name__)

PACKAGES = ("mamba_ssm", "causal_conv1d")
# The origin in a stand-in's spec, by which the mamba_ssm backend of `vim.ops` tells it from the package.
ORIGIN = "vim.compat"


class StandIns(MetaPathFinder, Loader):
    """Finder and loader of the modules that stand in for packages.

    Args:
        packages: Names of the packages, from `PACKAGES`.
        lasting: The stand-ins are for the rest of the process.
    """

    def __init__(self, packages: Sequence[str], lasting: bool) -> None:
        self.packages, self.lasting = tuple(packages), lasting

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return the spec of a stand-in, or `None` for any other module."""
        if fullname.partition(".")[0] not in self.packages or fullname not in CONTENTS:
            return None
        is_package = any(name.startswith(f"{fullname}.") for name in CONTENTS)
        return ModuleSpec(fullname, self, origin=ORIGIN, is_package=is_package)

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave the creation to Python."""

    def exec_module(self, module: ModuleType) -> None:
        """Fill a module with its contents."""
        vars(module).update(CONTENTS[module.__name__], __getattr__=_submodules_of(module.__name__))


def _submodules_of(package: str) -> Callable[[str], ModuleType]:
    """Return a module's `__getattr__`, which imports submodules at first use, as the packages do on import."""

    def get(name: str) -> ModuleType:
        if f"{package}.{name}" not in CONTENTS:
            raise AttributeError(f"the stand-in of vim.compat for {package} has no {name!r}")
        return importlib.import_module(f"{package}.{name}")

    return get


def install(override: bool = False) -> tuple[str, ...]:
    """Put stand-ins for mamba-ssm and causal-conv1d in place, for the rest of the process.

    A package that is installed stays, unless `override` asks for its replacement. The log says which packages have a
    stand-in. A second call changes nothing.

    Args:
        override: Also replace packages that are installed. Modules that imported them before keep what they have.

    Returns:
        Names of the packages that have a lasting stand-in.
    """
    names = _names_to_serve(override, [s for s in _active() if s.lasting])
    if names:
        _announce(names)
        _put_in_place(StandIns(names, lasting=True))
    return tuple(name for name in PACKAGES if any(name in s.packages for s in _active() if s.lasting))


@contextlib.contextmanager
def as_mamba_ssm(override: bool = False) -> Iterator[tuple[str, ...]]:
    """Put stand-ins for mamba-ssm and causal-conv1d in place inside a `with` block.

    A package that is installed stays, unless `override` asks for its replacement. What is imported inside the block
    keeps working after it. The end of the block, an error included, removes what the block put in place.

    Args:
        override: Also replace packages that are installed.

    Yields:
        Names of the packages for which this block put a stand-in in place.
    """
    names = _names_to_serve(override, _active())
    if not names:
        yield ()
        return
    _announce(names)
    stand_ins = StandIns(names, lasting=False)
    replaced = _put_in_place(stand_ins)
    try:
        yield names
    finally:
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not stand_ins]
        _take_modules(lambda name, module: _loader_of(module) is stand_ins)
        sys.modules.update(replaced)


def state_of(package: str) -> str:
    """Return in words what an import of a package gives in this process: a stand-in, the package, or nothing."""
    if any(package in s.packages for s in _active()):
        return "vim.compat stands in for it"
    if _is_installed(package):
        return "the package; vim.compat stands in only with override=True"
    return "nothing; vim.compat.install() puts a stand-in in place"


def _active() -> list[StandIns]:
    return [finder for finder in sys.meta_path if isinstance(finder, StandIns)]


def _names_to_serve(override: bool, present: Sequence[StandIns]) -> tuple[str, ...]:
    """Return the packages without a stand-in among `present` that are missing, or all of these with `override`."""
    names = [name for name in PACKAGES if not any(name in s.packages for s in present)]
    return tuple(name for name in names if override or not _is_installed(name))


def _is_installed(package: str) -> bool:
    """Return True if a package other than a stand-in is imported or can be found."""
    module = sys.modules.get(package)
    if module is not None and not isinstance(_loader_of(module), StandIns):
        return True
    others = [finder for finder in sys.meta_path if not isinstance(finder, StandIns)]
    return any(finder.find_spec(package, None) is not None for finder in others)


def _loader_of(module: ModuleType) -> object:
    return getattr(getattr(module, "__spec__", None), "loader", None)


def _announce(names: Sequence[str]) -> None:
    replaced = [name for name in names if _is_installed(name)]
    note = f", in place of the installed {' and '.join(replaced)}" if replaced else ""
    _warn_once(f"vim.compat stands in for {' and '.join(names)}, with the kernels of vim.ops{note}")


@functools.cache
def _warn_once(message: str) -> None:
    _logger.warning(message)


def _put_in_place(stand_ins: StandIns) -> dict[str, ModuleType]:
    """Have imports find the stand-ins first; return the imported modules that they replace."""
    replaced = _take_modules(lambda name, module: name.partition(".")[0] in stand_ins.packages)
    sys.meta_path.insert(0, stand_ins)
    return replaced


def _take_modules(condition: Callable[[str, ModuleType], bool]) -> dict[str, ModuleType]:
    """Remove the modules that meet the condition from `sys.modules`, and return them by name."""
    found = {name: m for name, m in sys.modules.items() if isinstance(m, ModuleType) and condition(name, m)}
    for name in found:
        del sys.modules[name]
    return found
