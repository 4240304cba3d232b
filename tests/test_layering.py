"""Imports point down only: entry points, training, tasks, inference, runtime, models and data, layers, ops."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "vim"
MODULES = sorted(PACKAGE.rglob("*.py"))
# What each part may import of ours, besides itself.
MAY_IMPORT = {
    "version": set(),
    "git_lfs": set(),
    "config": set(),
    "ops": set(),
    "layers": {"ops"},
    "checkpoints": {"layers", "git_lfs"},
    "models": {"layers", "checkpoints", "config", "git_lfs"},
    "data": {"config", "git_lfs"},
    "runtime": {"data", "checkpoints", "config", "version"},
    "inference": {"runtime", "data", "models", "checkpoints", "config", "compat", "ops", "version"},
    "tasks": {"inference", "runtime", "data", "models", "checkpoints", "config"},
    "training": {"tasks", "inference", "runtime", "data", "models", "checkpoints", "config"},
    "explain": {"training", "inference", "runtime", "data", "models", "checkpoints", "config", "layers", "ops"},
    "benchmarking": {"runtime", "models", "ops", "compat"},
    "compat": {"layers", "ops", "checkpoints"},
}
ENTRY_POINTS = {
    "__main__",
    "train",
    "validate",
    "predict",
    "benchmark",
    "convert",
    "doctor",
    "export",
    "build",
    "report",
    "card",
}


def _part(module: Path) -> str:
    parts = module.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py") if parts[0] != "__init__.py" else "__init__"


@functools.cache
def _imports(module: Path) -> set[str]:
    """Full names of what a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import; write the full name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _imports_of_ours() -> list[tuple[Path, str]]:
    """Each module of the package with each name of the package that it imports."""
    return [(module, name) for module in MODULES for name in _imports(module) if name.split(".")[0] == "vim"]


def _is_allowed(part: str, target: str) -> bool:
    if part == "__main__":  # the list of commands
        return target in {"runtime", "version"}
    if part in ENTRY_POINTS:
        return target not in ENTRY_POINTS - {part}
    return part == "__init__" or target in MAY_IMPORT[part] | {part}


def test_imports_point_down():
    wrong = [
        f"{module.relative_to(PACKAGE)} imports {name}"
        for module, name in _imports_of_ours()
        if not _is_allowed(_part(module), [*name.split("."), ""][1])
    ]
    assert wrong == []


def test_every_part_has_its_place():
    assert {_part(module) for module in MODULES} <= set(MAY_IMPORT) | ENTRY_POINTS | {"__init__"}


def test_layers_use_the_interfaces_of_ops_only():
    """That is: `vim.ops`, an op's interface, the checks of arguments, and the state of torch."""
    public = re.compile(r"vim\.ops\.(\w+|\w+\.interface\.\w+|common\.(checks|eager)\.\w+)")
    used = [(m.name, name) for m, name in _imports_of_ours() if _part(m) == "layers" and name.startswith("vim.ops")]
    assert used
    assert [(module, name) for module, name in used if not public.fullmatch(name)] == []


def test_triton_and_mamba_ssm_are_imported_by_their_backends_only():
    heavy = {"triton", "mamba_ssm", "causal_conv1d", "causal_conv1d_cuda", "selective_scan_cuda"}
    found = {module.stem for module in MODULES if any(name.split(".")[0] in heavy for name in _imports(module))}
    assert found == {"triton", "triton_tensors", "mamba_ssm"}
