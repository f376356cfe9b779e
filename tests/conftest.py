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
