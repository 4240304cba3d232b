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

# Which of our models: a shell pattern.
PATTERN = os.environ.get("VIM_TIMM_SUITE", "vim_*")
# What does not apply, and why.
EXCLUDED = {
    "torchscript": "TorchScript is not supported: torch.compile, torch.export and ONNX are",
    "pretrained": "needs the hub",
    "space2depth": "about the stems of convolutional networks",
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
    return [name for name in names if fnmatch.fnmatch(name.partition(".")[0], PATTERN)]


timm.list_models = _list_ours


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop the tests of other families (they name their models) and what is excluded."""
    ours = [item for item in items if "vim_" in item.name and not any(word in item.name for word in EXCLUDED)]
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what was left out."""
    for word, reason in EXCLUDED.items():
        terminalreporter.write_line(f"left out: *{word}*: {reason}")
