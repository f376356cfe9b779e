"""The MuSiQue agent against an OpenAI endpoint over HTTP that does what it is told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from optional import needs

from agent_lightning.rollouts.agents import load

pytestmark = needs("agents")
reward: Any = load("examples/musique/reward.py:score")
ASK = "<think>Who sang?</think><query>singer of The Doors</query>"
ANSWER = "<think>It says so.</think><answer>Jim Morrison</answer>"
TASK = {
    "question": "Who sang in the band of Light My Fire?",
    "answer": "Jim Morrison",
    "paragraphs": [
        {"idx": 0, "title": "Oslo", "paragraph_text": "The capital of Norway."},
        {"idx": 1, "title": "The Doors", "paragraph_text": "Jim Morrison was the singer."},
    ],
}


@pytest.fixture(scope="module")
def solve() -> Any:
    """The agent, which imports the OpenAI Agents SDK."""
    return load("examples/musique/agent.py:solve")


class World:
    """A policy that replies with its script turn by turn, and a search service; both keep their requests."""

    def __init__(self, *script: str) -> None:
        self.script, self.conversations, self.searched = script, [], []

    async def chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.conversations.append(body["messages"])
        turn = sum(message["role"] == "assistant" for message in body["messages"])
        message = {"role": "assistant", "content": self.script[turn], "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        reply = {"id": "c", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
        return web.json_response(reply)

    async def search(self, request: web.Request) -> web.Response:
        self.searched.append(await request.json())
        passage = {"doc_id": "d", "title": "The Doors", "text": "A band with Jim Morrison.", "score": 1.0}
        return web.json_response({"passages": [passage]})


@asynccontextmanager
async def serving(world: World) -> AsyncIterator[SimpleNamespace]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", world.chat)
    app.router.add_post("/search", world.search)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    root = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield SimpleNamespace(base_url=f"{root}/v1", api_key="key", model="tiny", search=f"{root}/search")
    await runner.cleanup()


async def test_what_it_searched_for_comes_back_and_it_answers(solve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(ASK, ANSWER)
    async with serving(world) as policy:
        monkeypatch.setenv("MUSIQUE_SEARCH_URL", policy.search)
        turns = await solve(TASK, policy)
    assert turns == [ASK, ANSWER]
    assert reward(TASK, turns) == pytest.approx(1.0)
    assert world.searched == [{"query": "singer of The Doors", "k": 3}]
    first, second = world.conversations
    assert [message["role"] for message in first] == ["system", "user"]
    # Each request extends the one before, which is what makes its tokens one training row.
    assert second[:2] == first
    assert second[2]["content"] == ASK
    assert second[3] == {"role": "user", "content": "(1) The Doors: A band with Jim Morrison."}


async def test_without_a_service_it_searches_the_questions_own_paragraphs(
    solve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bm25s")
    pytest.importorskip("Stemmer")
    monkeypatch.delenv("MUSIQUE_SEARCH_URL", raising=False)
    world = World(ASK, "<think>?</think><query>zebra</query>", ANSWER)
    async with serving(world) as policy:
        await solve(TASK, policy)
    assert world.conversations[1][-1]["content"] == "(1) The Doors: Jim Morrison was the singer."
    assert world.conversations[2][-1]["content"] == "Nothing found."


async def test_it_stops_after_its_last_turn(solve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(*[ASK] * 9)
    async with serving(world) as policy:
        monkeypatch.setenv("MUSIQUE_SEARCH_URL", policy.search)
        turns = await solve(TASK, policy)
    assert len(turns) == 5
    assert reward(TASK, turns) == 0.0
