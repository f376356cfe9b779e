"""Packages that only some tests need: `make venv-examples` installs them, and without them those tests skip."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


def needs(*modules: str) -> pytest.MarkDecorator:
    """A mark that skips a test if one of these top-level modules is missing.

    It imports nothing, other than `pytest.importorskip`: LangChain or the Agents SDK would add seconds to each
    collection of the tests.

    Example:

        pytestmark = needs("langgraph", "langchain_openai")
    """
    missing = [module for module in modules if find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}; `make venv-examples`")
