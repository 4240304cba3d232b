"""pytest plugin: timm's own model tests, over our models only.

timm's tests draw their cases from `timm.list_models` when they are collected; here it answers with our names. The size
filters that timm uses for itself stay in force. Ours belong with the families that have no pyramid of features, as
timm's own ViTs do: a filter of timm's tests that names `vit_*` counts for ours. Loaded by scripts/timm_suite.sh.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from typing import Any

import pytest
import timm

import vim  # noqa: F401  (registers our models)

# Which of our models: shell patterns, separated by spaces.
PATTERNS = os.environ.get("VIM_TIMM_SUITE", "vim_*").split()
# What does not apply, and why.
EXCLUDED = {
    "torchscript": "TorchScript is not supported: torch.compile, torch.export and ONNX are",
    "pretrained": "needs the hub",
    "space2depth": "about the stems of convolutional networks",
}
# What timm tests on each of its ViTs: none of it may go missing when timm renames or moves a test.
EXPECTED = {
    "test_model_forward",
    "test_model_backward",
    "test_model_default_cfgs_non_std",
    "test_model_forward_intermediates",
    "test_model_forward_intermediates_features",
    "test_model_forward_fx",
    "test_model_backward_fx",
    "test_prune_intermediate_layers_contract",
}

_list_models = timm.list_models


def _list_ours(
    filter: str | Sequence[str] = "", module: Any = "", exclude_filters: str | Sequence[str] = "", **kwargs: Any
) -> list[str]:
    """timm.list_models, kept to our names."""
    excluded = [exclude_filters] if isinstance(exclude_filters, str) else list(exclude_filters)
    wanted = [filter] if isinstance(filter, str) else list(filter)
    if "vit_*" in excluded or not ("vit_*" in wanted or wanted == [""]):
        return []
    names = _list_models("vim_*", exclude_filters=[f for f in excluded if f], **kwargs)
    return [name for name in names if any(fnmatch.fnmatch(name.partition(".")[0], pattern) for pattern in PATTERNS)]


timm.list_models = _list_ours


def _model_of(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get("model_name", "")) if callspec else ""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop the tests of other families (they name their models) and what is excluded; miss nothing."""
    ours = [i for i in items if _model_of(i).startswith("vim_") and not any(word in i.name for word in EXCLUDED)]
    missing = EXPECTED - {getattr(item, "originalname", item.name) for item in ours}
    if missing:
        raise pytest.UsageError(f"no model of ours matches {PATTERNS}, or timm has no more tests {sorted(missing)}")
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours


def pytest_configure(config: pytest.Config) -> None:
    """Know the mark of a plugin that is not needed here."""
    config.addinivalue_line("markers", "timeout: seconds that a test may take")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """A skipped test of ours has not passed."""
    report = yield
    if report.skipped:
        report.outcome, report.longrepr = "failed", f"skipped by timm, so not tested: {report.longrepr}"
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what was left out."""
    for word, reason in EXCLUDED.items():
        terminalreporter.write_line(f"left out: *{word}*: {reason}")
