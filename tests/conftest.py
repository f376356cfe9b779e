"""Every test: no network service of ours or theirs is called, and a test writes to its own folder only."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

# Read when the libraries are imported, so they are set before any test module is.
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_configure(config: pytest.Config) -> None:
    """Load the plugin of Schemathesis, which not everybody has installed; the others are in pyproject.toml."""
    if find_spec("schemathesis") is not None:
        config.pluginmanager.import_plugin("schemathesis.pytest.plugin")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Say which tests share a process of pytest-xdist (`make test` has two): those that start Ray or vLLM run one
    after the other, and first, as they take longest; those on the policy server share it; others keep to their file."""
    if not config.pluginmanager.hasplugin("dsession") and not hasattr(config, "workerinput"):
        return

    def group(item: pytest.Item) -> str:
        if "policy_server" in getattr(item, "fixturenames", ()):
            return "policy_server"
        return "stack" if item.get_closest_marker("stack") else str(item.path)

    order = {"stack": 0, "policy_server": 1}
    items.sort(key=lambda item: order.get(group(item), 2))
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))
