"""Importing is free: it starts nothing, changes nothing and brings nothing heavy. Agents need nothing of ours."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from agent_lightning.config.load import project_folder

PACKAGE = Path(__file__).parents[2] / "agent_lightning"
HEAVY_MODULES = {
    "agent_lightning.core.actors",
    "agent_lightning.learners.attention",
    "agent_lightning.learners.verl_cpu",
    "agent_lightning.learners.head",
    "agent_lightning.learners.verl_engines",
    "agent_lightning.api.cli.submit",
    "agent_lightning.learners.verl_worker",
    "agent_lightning.launch.nodes",
    "agent_lightning.serving.app",
    "agent_lightning.serving.grammars",
    "agent_lightning.serving.replica",
    "agent_lightning.serving.weights",
    "agent_lightning.testing.run",
    "agent_lightning.launch.sweeps.tune",
}
"""Those that import Ray, vLLM, veRL or torch at once, as what they define is a class or a plug-in of these."""
HEAVY_LIBRARIES = ("ray", "torch", "vllm", "verl", "transformers", "wandb", "matplotlib", "datasets", "pyarrow")

PROBE = """
import importlib, json, os, signal, sys, threading
before = dict(os.environ), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
for name in sys.argv[1:]:
    importlib.import_module(name)
after = dict(os.environ), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
sys.stdout.write(json.dumps({
    "same": before == after, "threads": threading.active_count(),
    "loaded": [name for name in sys.modules if "." not in name],
}))
"""


def modules() -> list[str]:
    files = sorted(PACKAGE.rglob("*.py"))
    names = [".".join(("agent_lightning", *file.relative_to(PACKAGE).with_suffix("").parts)) for file in files]
    return [name.removesuffix(".__init__") for name in names]


def test_importing_starts_nothing_and_brings_nothing_heavy(tmp_path: Path) -> None:
    light = [name for name in modules() if name not in HEAVY_MODULES]
    command = [sys.executable, "-c", PROBE, *light]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    report = json.loads(ended.stdout)
    assert report["same"], "an import changed the environment or a signal handler"
    assert report["threads"] == 1
    assert not set(report["loaded"]) & set(HEAVY_LIBRARIES)
    assert list(tmp_path.iterdir()) == []


def test_the_heavy_modules_are_there() -> None:
    assert set(modules()) >= HEAVY_MODULES


@pytest.mark.parametrize("name", ["agent.py", "calculator.py", "reward.py"])
def test_an_agent_imports_nothing_of_ours(name: str) -> None:
    tree = ast.parse((project_folder("examples") / "calc_x" / name).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported
    assert not {module for module in imported if module.split(".")[0] in ("agent_lightning", "ray", "verl", "vllm")}


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
