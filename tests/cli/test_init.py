"""agl init: a new project runs as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_lightning.api.cli.main import main
from agent_lightning.config.load import load
from agent_lightning.core.types import Task
from agent_lightning.launch.checks import load_tasks
from agent_lightning.testing.world import ToyWorld

EXPERIMENT = "experiment=experiment/mine.yaml"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "mine"]) == 0
    monkeypatch.chdir(tmp_path / "mine")
    return tmp_path / "mine"


async def test_a_new_project_learns_on_the_toy(project: Path) -> None:
    config = load([EXPERIMENT])
    assert config.experiment == "mine"
    tasks: list[Task] = load_tasks(config, "train")
    words = tuple("0123456")
    async with ToyWorld(agent=config.agent, tasks=tasks, words=words, val_tasks=load_tasks(config, "val")) as world:
        state = await world.train(steps=5)
    assert world.observer.records[-1]["train/reward"] > world.observer.records[0]["train/reward"]
    assert world.observer.records[0]["reward_part/format"] == 1.0
    assert not state.failed
