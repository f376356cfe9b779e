"""The browser of the tests of `agl view`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from browsing import chromium, let_in, watched_page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def context(address: str, browser: Any) -> Any:
    """A context of the browser that has opened `address`, a fixture of the module."""
    return let_in(browser, address)


@pytest.fixture
def page(context: Any) -> Iterator[Any]:
    """A page that may show no error."""
    with watched_page(context) as page:
        yield page
