"""Imports point down only: entry points, training, tasks, inference, runtime, models and data, layers, ops."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

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


def _imports(module: Path) -> set[str]:
    """Full names of the modules of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import; write the full name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "vim"}


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(PACKAGE)))
def test_imports_point_down(module):
    part = _part(module)
    for name in _imports(module):
        target = [*name.split("."), ""][1]
        if part == "__main__":
            assert target in {"runtime", "version"}, f"the list of commands imports {name}"
        elif part in ENTRY_POINTS:
            assert target not in ENTRY_POINTS - {part}, f"{part} imports another entry point, {name}"
        elif part != "__init__":
            assert target in MAY_IMPORT[part] | {part}, f"{part} may not import {name}"


def test_every_part_has_its_place():
    assert {_part(module) for module in MODULES} <= set(MAY_IMPORT) | ENTRY_POINTS | {"__init__"}


@pytest.mark.parametrize("module", [m for m in MODULES if _part(m) == "layers"], ids=lambda m: m.name)
def test_layers_use_the_interfaces_of_ops_only(module):
    """That is: `vim.ops`, an op's interface, the checks of arguments, and the state of torch."""
    public = re.compile(r"vim\.ops\.(\w+|\w+\.interface\.\w+|common\.(checks|eager)\.\w+)")
    for name in _imports(module):
        assert not name.startswith("vim.ops") or public.fullmatch(name), f"{module.name} reaches into vim.ops: {name}"


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(PACKAGE)))
def test_triton_and_mamba_ssm_are_imported_by_their_backends_only(module):
    heavy = {"triton", "mamba_ssm", "causal_conv1d", "causal_conv1d_cuda", "selective_scan_cuda"}
    for node in ast.walk(ast.parse(module.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name.split(".")[0] not in heavy or module.stem in ("triton", "triton_tensors", "mamba_ssm"), (
                f"{module}: {name}"
            )
