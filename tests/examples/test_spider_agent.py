"""Spider's LangGraph agent: its rounds, its roles, its checker, and the whole of it through the real gateway."""

import importlib.util
import sqlite3
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from aiohttp import web
from optional import needs

from agent_lightning.config.learning import AlgorithmConfig
from agent_lightning.config.load import load
from agent_lightning.config.running import AgentConfig
from agent_lightning.core.types import Task
from agent_lightning.rollouts import agents
from agent_lightning.testing.world import ToyWorld

pytestmark = needs("langgraph", "langchain_openai")
EXAMPLE = Path(__file__).parents[2] / "examples" / "spider"
TARGET = f"{EXAMPLE}/agent.py"

sys.path.insert(0, str(EXAMPLE))
databases = importlib.import_module("databases")
sys.path.remove(str(EXAMPLE))


@pytest.fixture(scope="module")
def agent():
    """The agent's module, which imports LangGraph."""
    spec = importlib.util.spec_from_file_location("spider_agent", TARGET)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as path:
        path.syspath_prepend(str(EXAMPLE))
        spec.loader.exec_module(module)
    return module


COUNT = "SELECT count(*) FROM singer"


class Model:
    """An OpenAI endpoint that replies with the next line of a role's script, and keeps what it was asked."""

    def __init__(self, **script: list[str]) -> None:
        self.script = script
        self.asked: list[tuple[str, str]] = []

    async def answer(self, request: web.Request) -> web.Response:
        role, body = request.headers["x-agl-agent"], await request.json()
        self.asked.append((role, body["messages"][-1]["content"]))
        message = {"role": "assistant", "content": self.script[role].pop(0)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return web.json_response(
            {"id": "call", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
        )


@asynccontextmanager
async def serving(model):
    app = web.Application()
    app.router.add_post("/v1/chat/completions", model.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield SimpleNamespace(base_url=f"http://127.0.0.1:{runner.addresses[0][1]}/v1", api_key="key", model="policy")
    await runner.cleanup()


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("databases") / "concert" / "concert.sqlite"
    path.parent.mkdir()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE singer (name TEXT, age INT)")
    connection.execute("INSERT INTO singer VALUES ('Ann', 30), ('Bob', 41)")
    connection.commit()
    connection.close()
    schema = databases.schema(path)
    place = {"db_id": "concert", "databases": str(path.parents[1]), "schema": schema}
    return place | {"question": "How many singers?", "query": COUNT}


@pytest.mark.parametrize(
    ("script", "roles", "query"),
    [
        ({"writer": [f"```sql\n{COUNT};\n```"], "checker": ["CORRECT"]}, "writer checker", f"{COUNT};"),
        (
            {"writer": ["SELECT nobody FROM singer"], "checker": ["INCORRECT: no such column"], "rewriter": [COUNT]}
            | {"checker": ["INCORRECT: no such column", "It is CORRECT."]},
            "writer checker rewriter checker",
            COUNT,
        ),
        (
            {"writer": ["SELECT 1"], "checker": ["Count them.", "Count all."], "rewriter": ["SELECT 3", "SELECT 4"]},
            "writer checker rewriter checker rewriter",
            "SELECT 4",
        ),
    ],
)
async def test_the_agent_writes_checks_and_rewrites_in_at_most_three_rounds(task, script, roles, query, agent):
    model = Model(**{role: list(lines) for role, lines in script.items()})
    async with serving(model) as policy:
        assert await agent.solve(task, policy) == query
    assert [role for role, _ in model.asked] == roles.split()
    assert model.asked[0][1] == "table singer: name, age\nQuestion: How many singers?"


async def test_what_the_models_see_of_a_result(task, agent):
    writer = ["SELECT nobody FROM singer"]
    model = Model(writer=writer, checker=["No.", "No."], rewriter=["SELECT name, age FROM singer", "DROP TABLE singer"])
    async with serving(model) as policy:
        await agent.solve(task, policy)
    seen = [message.partition("\nQuery: ")[2] for _, message in model.asked]
    assert seen[1] == "SELECT nobody FROM singer\nResult: error: no such column: nobody"
    assert seen[3] == "SELECT name, age FROM singer\nResult: Ann | 30\nBob | 41"
    assert seen[4] == f"{seen[3]}\nVerdict: No."
    assert agent.shown(databases.Table(columns=("a",), rows=((1,),), cut=True)) == "1\n…"
    assert agent.shown(databases.Table(columns=("a",), rows=(), cut=False)) == "no rows"


async def test_the_checker_may_be_another_model_elsewhere(task, monkeypatch, agent):
    model, other = Model(writer=["SELECT 1"], rewriter=[COUNT]), Model(checker=["No.", "CORRECT"])
    async with serving(model) as policy, serving(other) as elsewhere:
        monkeypatch.setenv("CHECKER_BASE_URL", elsewhere.base_url)
        monkeypatch.setenv("CHECKER_MODEL", "large")
        assert await agent.solve(task, policy) == COUNT
    assert [role for role, _ in model.asked] == ["writer", "rewriter"]


def test_the_experiments_agent_and_reward_can_be_run():
    config = load(["experiment=spider"])
    agents.check(config.agent.target, config.agent.mode)
    agents.load(config.agent.reward)


@pytest.mark.slow
async def test_the_agent_learns_through_the_gateway(task):
    spec = AgentConfig(target=f"{TARGET}:solve", reward=f"{EXAMPLE}/reward.py:score", timeout_s=60.0)
    tasks = [Task(task_id="a", payload=task), Task(task_id="b", payload=task | {"question": "Count the singers."})]
    words = ("CORRECT", "SELECT age FROM singer", COUNT)
    async with ToyWorld(agent=spec, tasks=tasks, words=words, algorithm=AlgorithmConfig(rollouts_per_task=16)) as world:
        state = await world.train(steps=8)
    assert state.val_rewards[-1][1] == 1.0
    assert state.val_rewards[0][1] == 0.0
    assert not state.failed
