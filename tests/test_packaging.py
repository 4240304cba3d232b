"""What is declared: names, versions, licence, extras, and that the README's commands are CI's."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import vim

ROOT = Path(__file__).parents[1]
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text()


def test_names_and_licence():
    project = PROJECT["project"]
    assert (project["name"], project["license"]) == ("vimamba", "Apache-2.0")
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert re.fullmatch(r"\d+\.\d+\.\d+", vim.__version__)
    assert f"## {vim.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_torch_is_no_build_requirement():
    assert not any(requirement.startswith("torch") for requirement in PROJECT["build-system"]["requires"])


def test_dependencies():
    dependencies = PROJECT["project"]["dependencies"]
    assert "torch>=2.10" in dependencies
    assert "timm>=1.0.31" in dependencies
    names = {re.split(r"[<>=\[]", d)[0] for d in dependencies}
    assert names == {"torch", "torchvision", "timm", "einops", "numpy", "safetensors", "ninja"}


def test_kernels_that_compile_at_install_are_in_their_own_extra_only():
    extras = PROJECT["project"]["optional-dependencies"]
    assert extras["mamba"] == ["causal-conv1d", "mamba-ssm"]
    assert not any("mamba" in requirement.replace("vimamba", "") for requirement in extras["dev"])


def test_the_readme_sets_up_in_two_lines_which_ci_runs():
    setup = 'python -m venv .venv && . .venv/bin/activate && pip install -e ".[dev]" && python -m vim.train'
    assert setup in README
    assert "pytest -q" in README
    ci = (ROOT / ".ci" / "run").read_text()
    assert 'pip install -e ".[dev]"' in ci
    assert "pytest -q" in ci


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_every_environment_variable_is_documented():
    documented = (ROOT / "docs" / "environment.md").read_text()
    sources = [*(ROOT / "vim").rglob("*.py"), ROOT / "setup.py"]
    for source in (s for s in sources if s.exists()):
        for name in re.findall(r"""["'](VIM_[A-Z_]+)["']""", source.read_text()):
            assert name in documented, f"{source.name} reads {name}"
