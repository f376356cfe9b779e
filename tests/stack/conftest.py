"""`policy_server`: one policy on vLLM, which the modules that use it share. It starts with the first test that uses it
and ends when the next test does not, so keep those modules next to each other in the alphabet."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from policy_server import PolicyServer

_RUNNING: list[PolicyServer] = []


@pytest.fixture
def policy_server() -> PolicyServer:
    if not _RUNNING:
        _RUNNING.append(PolicyServer())
    return _RUNNING[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    yield
    if _RUNNING and "policy_server" not in getattr(nextitem, "fixturenames", ()):
        _RUNNING.pop().close()
