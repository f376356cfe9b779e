"""The agent that searches, on the OpenAI Agents SDK, through the real gateway with its tiny policy."""

from __future__ import annotations

import pytest

pytest.importorskip("agents")
pytest.importorskip("bm25s")

from agent_lightning import launch
from agent_lightning.config import load
from agent_lightning.types import Outcome, Task

pytestmark = [pytest.mark.stack, pytest.mark.slow, pytest.mark.timeout(420)]
TOWNS = {"Oslo": "Norway", "Bern": "Switzerland", "Accra": "Ghana", "Quito": "Ecuador"}
PARAGRAPHS = [
    {"idx": i, "title": town, "paragraph_text": f"{town} is a city in {land}. It is the capital of the country."}
    for i, (town, land) in enumerate(TOWNS.items())
]


async def test_the_agent_asks_searches_and_answers_and_its_searches_arrive_as_tool_spans() -> None:
    config = load(["experiment=musique_tiny_relations", "model.max_len=512"])
    async with launch.system(config, train=False, workers=1) as system:
        for town, land in TOWNS.items():
            payload = {"question": f"{town} >> author", "answer": land, "paragraphs": PARAGRAPHS}
            await system.buffer.admit(Task(task_id=town, payload=payload), split="val", num_rollouts=1)
        groups = await system.buffer.take(len(TOWNS), split="val")
    (trajectories) = [group.trajectories[0] for group in groups]
    assert [one.outcome for one in trajectories] == [Outcome.FINISHED] * len(TOWNS)
    searched = [one for one in trajectories if one.tools]
    assert searched, "the policy searches for an author"
    for one in searched:
        assert [(tool.name, tool.status) for tool in one.tools] == [("search", "ok")] * (len(one.calls) - 1)
        assert one.calls[1].prompt_T.size > one.calls[0].prompt_T.size + one.calls[0].response_T.size
