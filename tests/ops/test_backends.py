"""The registry of backends: names, reasons, defaults."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

import vim.ops
from tests.backends import ALL, chosen_op
from tests.processes import run_python
from vim.ops import available_backends, unavailable_backends
from vim.ops.backends.registry import Backend, isolated_registry, pin_to_reference, register_backend, resolve_backend

OPS = [
    *("add_rms_norm", "bidirectional_block", "bidirectional_conv1d", "bidirectional_scan", "causal_conv1d"),
    *("embed_patches", "segmented_conv1d", "segmented_scan", "selective_scan"),
]


@pytest.mark.parametrize("op", OPS)
def test_the_reference_runs_everywhere(op):
    for device in ("cpu", "cuda", "mps", "meta"):
        assert "reference" in available_backends(op, device)


@pytest.mark.parametrize("op", OPS)
def test_every_backend_is_available_or_says_why_not(op):
    reasons = unavailable_backends(op)
    assert set(available_backends(op)) | set(reasons) == ALL
    assert all(len(reason) > 10 for reason in reasons.values())


def test_unknown_op():
    for function in (available_backends, unavailable_backends):
        with pytest.raises(ValueError, match=r"op must be one of \[.*selective_scan.*\], got 'attention'"):
            function("attention")


@pytest.fixture
def absent_backend():
    """A backend that cannot run, in front of the others."""
    with isolated_registry():
        register_backend(Backend("imaginary", "_imaginary", lambda op, device, dtype: "it does not exist"))
        yield


def test_a_backend_that_is_named_runs_or_raises_with_the_reason(absent_backend):
    with pytest.raises(RuntimeError, match=r"'imaginary' cannot run add_rms_norm on cpu .*: it does not exist"):
        vim.ops.add_rms_norm(torch.ones(2, 3), None, torch.ones(3), backend="imaginary")
    assert unavailable_backends("add_rms_norm")["imaginary"] == "it does not exist"


def test_a_default_falls_back_and_says_so_once(absent_backend, caplog):
    with caplog.at_level(logging.WARNING, "vim"):
        for _ in range(3):
            vim.ops.add_rms_norm(torch.ones(2, 3), None, torch.ones(3))
            vim.ops.causal_conv1d(torch.ones(1, 2, 3), torch.ones(2, 4))
    assert [r.getMessage() for r in caplog.records] == ["backend 'imaginary' is not used on cpu: it does not exist"]


def test_default_backend_for_a_block():
    x = torch.ones(2, 3)
    usual, pinned = resolve_backend("add_rms_norm", None, x), torch.ops.vim.add_rms_norm_reference.default
    with vim.ops.default_backend("reference"):
        assert resolve_backend("add_rms_norm", None, x) is pinned
        assert resolve_backend("add_rms_norm", "emulated", x) is torch.ops.vim.add_rms_norm_emulated.default
    assert resolve_backend("add_rms_norm", None, x) is usual is not pinned
    with pytest.raises(ValueError, match=r"backend must be one of .*'fast'"), vim.ops.default_backend("fast"):
        pass


def test_import_is_light(tmp_path):
    """Importing vim compiles nothing, starts no CUDA and needs no triton; predicting needs no package of training."""
    heavy = ["triton", "jsonargparse", "rich", "matplotlib", "sklearn", "tensorboard", "mamba_ssm", "causal_conv1d"]
    code = (
        f"import sys, torch, timm; heavy = {heavy}\n"
        "for name in [name for name in sys.modules if name.split('.')[0] in heavy]: del sys.modules[name]\n"
        "import vim, vim.ops, vim.doctor, vim.predict, vim.inference.predictor\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not {name.split('.')[0] for name in sys.modules} & set(heavy)\n"
    )
    run_python("-c", code, VIM_CACHE_DIR=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_a_backend_by_name_only_is_never_the_default():
    usual = chosen_op("add_rms_norm", None, "cpu")
    with isolated_registry({"reference"}):
        register_backend(Backend("shy", "_triton", lambda op, device, dtype: None, by_name_only=True))
        assert chosen_op("add_rms_norm", "shy", "cpu") is torch.ops.vim.add_rms_norm_triton.default
        assert chosen_op("add_rms_norm", None, "cpu") is torch.ops.vim.add_rms_norm.default
    assert chosen_op("add_rms_norm", None, "cpu") is usual


def test_an_isolated_registry_leaves_nothing_behind():
    usual = chosen_op("add_rms_norm", None, "meta")
    with isolated_registry():
        pin_to_reference("meta")
        register_backend(Backend("other", "_reference", lambda op, device, dtype: None))
        assert chosen_op("add_rms_norm", None, "meta") is torch.ops.vim.add_rms_norm_reference.default
    assert chosen_op("add_rms_norm", None, "meta") is usual
    assert "other" not in available_backends("add_rms_norm")


@pytest.mark.parametrize("enter", [lambda: vim.ops.default_backend("reference"), vim.ops.exportable_ops])
def test_a_choice_of_one_thread_is_not_anothers(enter):
    """Two threads that enter and leave in turn leave nothing behind, and see nothing of each other."""
    x = torch.ones(2, 3)
    usual = resolve_backend("add_rms_norm", None, x)
    entered, left, seen = threading.Event(), threading.Event(), []

    def hold() -> None:
        with enter():
            seen.append(resolve_backend("add_rms_norm", None, x))
            entered.set()
            left.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(10)
    with enter():
        seen.append(resolve_backend("add_rms_norm", None, x))
        left.set()
        thread.join()
    assert resolve_backend("add_rms_norm", None, x) is usual
    assert all(op is not usual for op in seen)


def test_a_choice_ends_with_an_interrupt():
    x = torch.ones(2, 3)
    usual = resolve_backend("add_rms_norm", None, x)
    with pytest.raises(KeyboardInterrupt), vim.ops.default_backend("reference"), vim.ops.exportable_ops():
        raise KeyboardInterrupt
    assert resolve_backend("add_rms_norm", None, x) is usual
