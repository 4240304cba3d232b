"""What is declared: names, versions, licence, extras, and that the README's commands are CI's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vim
from vim.ops.build import compilation

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
    assert names == {"torch", "torchvision", "timm", "einops", "numpy", "safetensors"}


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


_GRAFTED = ("csrc", "configs", "docs", "examples", "scripts", "tests")


def _build(kind: str, source: Path, target: Path, **environment: str) -> Path:
    """Have setuptools build from a folder, as pip does."""
    target.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory):
    """What a source distribution of this repository unpacks to."""
    folder = tmp_path_factory.mktemp("packaging")
    copy = folder / "copy"
    for name in ("vim", *_GRAFTED):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    for path in ROOT.glob("*.*"):
        if path.is_file():
            shutil.copy(path, copy)
    shutil.copy(ROOT / "LICENSE", copy)
    (folder / "unpacked").mkdir()
    # Not `tarfile`, whose argument `filter` some releases of Python 3.10 and 3.11 lack and later ones demand.
    subprocess.run(["tar", "-xf", _build("sdist", copy, folder / "sdist"), "-C", folder / "unpacked"], check=True)
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.mark.slow
def test_a_source_distribution_has_everything(source_distribution):
    for name in _GRAFTED:
        unwanted = {"__pycache__", "golden"}
        wanted = {p.relative_to(ROOT) for p in (ROOT / name).rglob("*.*") if p.is_file() and not unwanted & {*p.parts}}
        assert wanted
        assert {p.relative_to(source_distribution) for p in (source_distribution / name).rglob("*.*")} == wanted


_WRITE_AN_EMPTY_FILE = 'for word in "$@"; do [ "$last" = -o ] && out=$word; last=$word; done\n: > "$out"'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choice", "compiler", "tag", "libraries"),
    [
        ("", _WRITE_AN_EMPTY_FILE, "py3-none-linux", 1),
        ("1", _WRITE_AN_EMPTY_FILE, "py3-none-linux", 1),
        ("0", _WRITE_AN_EMPTY_FILE, "py3-none-any", 0),
        ("auto", "echo error: boom; exit 1", "py3-none-any", 0),
    ],
)
def test_a_wheel_has_a_library_or_is_for_every_platform(
    choice, compiler, tag, libraries, source_distribution, tmp_path
):
    environment = _compiler(tmp_path, compiler) | {"VIM_BUILD_NATIVE": choice}
    built = _build("wheel", source_distribution, tmp_path / "wheel", **environment)
    assert f"-{tag}" in built.name
    with zipfile.ZipFile(built) as wheel:
        names = set(wheel.namelist())
    assert {"vim/csrc/cpu/kernels.cpp", "vim/__init__.py"} <= names
    key = compilation.source_key(ROOT / "csrc", compilation.cpu_recipe())
    assert {name for name in names if "_lib/" in name} == set([f"vim/_lib/{key}/libvimamba.so"] * libraries)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choice", "message"), [("1", "VIM_BUILD_NATIVE=1: .*boom"), ("yes", "must be one of auto, 0, 1, cuda, got 'yes'")]
)
def test_a_wheel_that_was_asked_for_and_cannot_be_built(choice, message, source_distribution, tmp_path):
    environment = _compiler(tmp_path, "echo error: boom; exit 1") | {"VIM_BUILD_NATIVE": choice}
    with pytest.raises(AssertionError, match=message):
        _build("wheel", source_distribution, tmp_path / "wheel", **environment)


def _compiler(folder: Path, body: str) -> dict[str, str]:
    """Return an environment with a false compiler."""
    compiler = folder / "c++"
    compiler.write_text(f"#!/bin/sh\n{body}\n")
    compiler.chmod(0o755)
    return {"CXX": str(compiler), "VIM_CACHE_DIR": str(folder / "cache")}


@pytest.mark.slow
def test_a_folder_named_vim_does_not_hide_an_editable_install(source_distribution, tmp_path):
    """The original's clone has one, without an `__init__.py`."""
    with zipfile.ZipFile(_build("editable", source_distribution, tmp_path / "wheel")) as wheel:
        wheel.extractall(tmp_path / "site")
    (tmp_path / "clone" / "vim").mkdir(parents=True)
    (tmp_path / "clone" / "vim" / "main.py").write_text("")
    code = f"import site; site.addsitedir({str(tmp_path / 'site')!r})\n"
    code += "import importlib.util; print(importlib.util.find_spec('vim').origin)"
    found = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path / "clone",
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str(source_distribution / "vim" / "__init__.py")
