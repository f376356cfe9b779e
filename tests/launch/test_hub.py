"""A model by its hub id, from a cache that an earlier run has filled: every process of a run resolves it by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from agent_lightning.config.load import resolve_path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = """
from agent_lightning.config.load import load
from agent_lightning.core.errors import UserError
from agent_lightning.core.hub import model_folder
from agent_lightning.launch import models
from agent_lightning.launch.checks import inspect

facts = models.read("org/tiny")
print(facts.location, facts.revision, facts.architecture)
print(model_folder(facts.location, facts.revision))
print(inspect(load(["experiment=calc_tiny", "model.path=org/tiny", "data.train.num=4", "data.val.num=4"])).missing)
try:
    model_folder("org/none")
except UserError as error:
    print(error)
"""


def test_a_hub_id_is_resolved_from_the_cache_where_there_is_no_network(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(resolve_path("examples/calc_x/tiny_policy"), snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    # In a process of its own: the hub's library reads its variables when it is imported.
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    facts, folder, missing, refusal = done.stdout.splitlines()
    assert facts == f"org/tiny {COMMIT} LlamaForCausalLM"
    assert folder == str(snapshot)
    assert missing == "[]"
    assert refusal.startswith("model.path=org/none: no local folder, and not reachable on the hub")
