"""Stand-ins for mamba-ssm and causal-conv1d: where they are put, what they say, and that they go again."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys

import pytest

from vim import compat
from vim.compat import stand_ins
from vim.compat.contents import CONTENTS
from vim.compat.refused import REFUSED
from vim.ops import available_backends, unavailable_backends


@pytest.fixture(autouse=True)
def imports():
    """Put the state of imports back after a test."""
    before = dict(sys.modules), list(sys.meta_path)
    stand_ins._warn_once.cache_clear()
    yield
    sys.meta_path[:] = before[1]
    for name in set(sys.modules) - set(before[0]):
        if name.partition(".")[0] in compat.PACKAGES:
            del sys.modules[name]


@pytest.fixture
def real_package(tmp_path, monkeypatch):
    """A package named mamba_ssm, as pip would install it."""
    package = tmp_path / "mamba_ssm"
    package.mkdir()
    (package / "__init__.py").write_text("from mamba_ssm.sub import real\n")
    (package / "sub.py").write_text("real = True\n")
    monkeypatch.syspath_prepend(tmp_path)


def _imported() -> set[str]:
    return {name for name in sys.modules if name.partition(".")[0] in compat.PACKAGES}


def test_a_block_takes_away_what_it_put_in_place():
    finders = list(sys.meta_path)
    with compat.as_mamba_ssm() as names:
        assert names == compat.PACKAGES
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        assert selective_scan_fn is compat.mamba_ssm.selective_scan_fn
        assert _imported()
    assert sys.meta_path == finders
    assert not _imported()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mamba_ssm")


def test_a_block_takes_it_away_after_an_error():
    finders = list(sys.meta_path)
    with pytest.raises(ModuleNotFoundError), compat.as_mamba_ssm():
        importlib.import_module("causal_conv1d.missing")
    assert not _imported()
    assert sys.meta_path == finders


def test_a_block_inside_a_block_leaves_the_outer_one():
    with compat.as_mamba_ssm():
        with compat.as_mamba_ssm() as names:
            assert names == ()
        importlib.import_module("mamba_ssm")
    assert not _imported()


def test_installing_twice_is_installing_once():
    before = len(sys.meta_path)
    assert compat.install() == compat.install() == compat.PACKAGES
    assert len(sys.meta_path) == before + 1
    finders = list(sys.meta_path)
    with compat.as_mamba_ssm() as names:
        assert names == ()
        module = importlib.import_module("mamba_ssm")
    assert sys.modules["mamba_ssm"] is module
    assert sys.meta_path == finders


def test_what_is_installed_inside_a_block_stays():
    with compat.as_mamba_ssm():
        importlib.import_module("mamba_ssm")
        assert compat.install() == compat.PACKAGES
    assert importlib.import_module("mamba_ssm").__version__ == "2.3.0+vim"


@pytest.mark.usefixtures("real_package")
def test_an_installed_package_stays():
    assert compat.install() == ("causal_conv1d",)
    assert importlib.import_module("mamba_ssm").real
    assert importlib.util.find_spec("mamba_ssm.ops") is None


@pytest.mark.usefixtures("real_package")
def test_an_installed_package_is_replaced_on_request_and_comes_back():
    real = importlib.import_module("mamba_ssm")
    before = _imported()
    with compat.as_mamba_ssm(override=True) as names:
        assert names == compat.PACKAGES
        assert importlib.import_module("mamba_ssm") is not real
    assert sys.modules["mamba_ssm"] is real
    assert _imported() == before


def test_the_log_says_once_what_is_stood_in_for(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with compat.as_mamba_ssm():
                pass
    assert [record.message for record in caplog.records] == [
        "vim.compat stands in for mamba_ssm and causal_conv1d, with the kernels of vim.ops"
    ]


@pytest.mark.usefixtures("real_package")
def test_the_log_names_a_replaced_package(caplog):
    with caplog.at_level(logging.WARNING), compat.as_mamba_ssm(override=True):
        pass
    assert caplog.records[0].message.endswith(", in place of the installed mamba_ssm")


@pytest.mark.parametrize("name", list(CONTENTS))
def test_every_module_can_be_imported_and_has_its_contents(name):
    with compat.as_mamba_ssm():
        module = importlib.import_module(name)
        assert all(hasattr(module, attribute) for attribute in CONTENTS[name])


def test_submodules_are_attributes_and_other_names_are_not():
    with compat.as_mamba_ssm():
        package = importlib.import_module("mamba_ssm")
        assert package.ops.triton.layer_norm.rms_norm_fn is compat.mamba_ssm.rms_norm_fn
        with pytest.raises(AttributeError, match=r"stand-in of vim.compat for mamba_ssm has no 'hydra'"):
            _ = package.hydra
        with pytest.raises(ModuleNotFoundError):  # so that models with a fallback of their own take it
            importlib.import_module("mamba_ssm.ops.triton.ssd_combined")


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_not_supported_is_refused_when_it_is_used(name):
    (stand_in,) = {contents[name] for contents in CONTENTS.values() if name in contents}
    type("Derived", (stand_in,), {})
    with pytest.raises(RuntimeError, match=f"mamba-ssm without {name}: "):
        stand_in(d_model=1)


def test_the_mamba_ssm_backend_does_not_take_a_stand_in_for_the_package():
    with compat.as_mamba_ssm():
        assert "mamba_ssm" not in available_backends("selective_scan", "cuda")
        reason = unavailable_backends("selective_scan", "cuda")["mamba_ssm"]
    assert "vim.compat stands in for" in reason
