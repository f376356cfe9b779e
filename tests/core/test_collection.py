"""The tests can be collected without the packages that only examples need, and collecting imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPTIONAL = [
    *("agents", "autogen_agentchat", "autogen_core", "autogen_ext", "bm25s", "faiss", "flask", "langchain"),
    *("langchain_core", "langchain_openai", "langgraph", "moto", "openinference", "s3fs", "schemathesis"),
    *("sentence_transformers", "Stemmer"),
]
"""The modules that `make venv-examples` installs and `make venv` does not."""
HEAVY = ["transformers", "verl", "vllm"]
"""Modules that take seconds to import; tests import them in functions and fixtures."""
FOLDERS = ["tests/chaos", "tests/examples", "tests/run", "tests/stack"]
"""The folders whose tests use such packages."""
SCRIPT = f"""
import sys, pytest
sys.modules.update(dict.fromkeys({OPTIONAL}))  # each import of them fails
code = pytest.main(["--collect-only", "-q", *{FOLDERS}])
heavy = [name for name in {HEAVY} if name in sys.modules]
sys.exit(f"imported: {{heavy}}" if heavy else code)
"""


def test_tests_are_collected_without_optional_packages_and_without_heavy_imports() -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
