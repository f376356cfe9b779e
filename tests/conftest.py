"""Every test: no network service of ours or theirs is called, and a test writes to its own folder only."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest

POLICY_SERVER = ("tests/stack/test_clients.py", "tests/stack/test_contract")
"""Paths of the tests that share a policy server (tests/stack/conftest.py) begin with these."""

# Read when the libraries are imported, so they are set before any test module is.
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_configure(config: pytest.Config) -> None:
    """Load the plugin of Schemathesis, which not everybody has installed; the others are in pyproject.toml."""
    if find_spec("schemathesis") is not None:
        config.pluginmanager.import_plugin("schemathesis.pytest.plugin")


def group(nodeid: str) -> str:
    """The tests with which a test shares a process of pytest-xdist: those of tests/stack that share a policy server;
    the others there, which start Ray or vLLM, one after the other; or those of its file."""
    path = nodeid.partition("::")[0]
    if not path.startswith("tests/stack/"):
        return path
    return "policy_server" if path.startswith(POLICY_SERVER) else "stack"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In several processes the groups that take longest begin first."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        order = {"stack": 0, "policy_server": 1}
        items.sort(key=lambda item: order.get(group(item.nodeid), 2))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        """Sends the tests of a group to one process."""

        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return Groups(config, log)
