"""A LangGraph agent that answers questions with SQL: a writer, a checker and a rewriter, in up to three rounds.

    write -> execute -> check -> done, or rewrite -> execute -> check -> …

It knows nothing of the training but `policy`, any object with `base_url`, `api_key` and `model`:

    await solve({"question": "How many singers?", "schema": "table singer: id", …}, policy)  # "SELECT count(*) …"

The checker may be another model: CHECKER_BASE_URL, CHECKER_API_KEY and CHECKER_MODEL in the environment say which.
"""

from __future__ import annotations

import asyncio
import functools
import os
import re
import ssl
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypedDict

import httpx
from databases import Failure, Limits, Table, files, run
from langchain_core.runnables import Runnable
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph

MAX_ROUNDS = 3
"""Queries that are written for one question."""
TIMEOUT = 600.0
"""Seconds for one reply: the engine may be busy with a thousand others."""
SHOWN = Limits(seconds=5.0, rows=5)
"""The part of a result that the checker and the rewriter see."""

WRITER = "Write one SQLite query that answers the question. Reply with the query only."
CHECKER = "Does the query answer the question? Reply CORRECT, or say in one sentence what is wrong."
REWRITER = "The query does not answer the question. Write a better SQLite query. Reply with the query only."


class Policy(Protocol):
    """Where the model is. The training passes such an object; the agent needs no more than this."""

    @property
    def base_url(self) -> str: ...
    @property
    def api_key(self) -> str: ...
    @property
    def model(self) -> str: ...


class State(TypedDict, total=False):
    """What the graph's nodes hand on. `rounds`: queries written so far."""

    question: str
    schema: str
    query: str
    result: str
    verdict: str
    rounds: int


async def solve(task: Mapping[str, Any], policy: Policy) -> str:
    """The last query written for a task: {"question", "schema", "db_id", "databases"}. Raises openai.APIError."""
    async with httpx.AsyncClient(verify=_tls(), timeout=TIMEOUT) as http:
        chat = functools.partial(ChatOpenAI, timeout=TIMEOUT, http_client=_blocking(), http_async_client=http)
        model = chat(model=policy.model, base_url=policy.base_url, api_key=policy.api_key)
        other = os.environ.get("CHECKER_BASE_URL")
        checker = model
        if other:
            key = os.environ.get("CHECKER_API_KEY", "none")
            checker = chat(model=os.environ.get("CHECKER_MODEL", policy.model), base_url=other, api_key=key)
        graph = build(
            writer=model.bind(extra_headers={"x-agl-agent": "writer"}),
            checker=checker.bind(extra_headers={"x-agl-agent": "checker"}),
            rewriter=model.bind(extra_headers={"x-agl-agent": "rewriter"}),
            database=files(task["databases"], task["db_id"])[0],
        )
        state = await graph.ainvoke({"question": task["question"], "schema": task["schema"]})
    return str(state["query"])


def build(*, writer: Runnable, checker: Runnable, rewriter: Runnable, database: Path) -> Any:
    """The graph over one database; each model is a chat model, or stands for one."""

    async def write(state: State) -> State:
        return {"query": query_in(await _ask(writer, WRITER, _task(state))), "rounds": 1}

    async def execute(state: State) -> State:
        return {"result": shown(await asyncio.to_thread(run, database, state["query"], SHOWN))}

    async def check(state: State) -> State:
        return {"verdict": await _ask(checker, CHECKER, _attempt(state))}

    async def rewrite(state: State) -> State:
        reply = await _ask(rewriter, REWRITER, f"{_attempt(state)}\nVerdict: {state['verdict']}")
        return {"query": query_in(reply), "rounds": state["rounds"] + 1}

    def after_execute(state: State) -> str:
        return "check" if state["rounds"] < MAX_ROUNDS else END

    def after_check(state: State) -> str:
        return END if "CORRECT" in state["verdict"].replace("INCORRECT", "") else "rewrite"

    nodes: dict[str, Callable[[State], Awaitable[State]]]
    nodes = {"write": write, "execute": execute, "check": check, "rewrite": rewrite}
    graph = StateGraph(State)
    for name, node in nodes.items():
        graph.add_node(name, node)
    graph.add_edge(START, "write")
    graph.add_edge("write", "execute")
    graph.add_conditional_edges("execute", after_execute, ["check", END])
    graph.add_conditional_edges("check", after_check, ["rewrite", END])
    graph.add_edge("rewrite", "execute")
    return graph.compile()


def query_in(reply: str) -> str:
    """The query of a reply, out of its code block where it has one: "```sql\\nSELECT 1\\n```" -> "SELECT 1"."""
    blocks = re.findall(r"```(?:sql|sqlite)?\s*(.*?)```", reply, flags=re.DOTALL | re.IGNORECASE)
    return (blocks[-1] if blocks else reply).strip()


def shown(result: Table | Failure) -> str:
    """A result as the models read it: "name | age", a line for each row; "error: no such column: x"; "no rows"."""
    if isinstance(result, Failure):
        return f"error: {result.message}"
    lines = [" | ".join(str(cell)[:40] for cell in row) for row in result.rows]
    return "\n".join([*lines, "…"] if result.cut else lines) or "no rows"


async def _ask(model: Runnable, system: str, user: str) -> str:
    reply = await model.ainvoke([("system", system), ("user", user)])
    return str(reply.text)


def _task(state: State) -> str:
    return f"{state['schema']}\nQuestion: {state['question']}"


def _attempt(state: State) -> str:
    return f"{_task(state)}\nQuery: {state['query']}\nResult: {state['result']}"


@functools.cache
def _tls() -> ssl.SSLContext:
    """Shared by the rollouts: it takes 30 ms to make."""
    return ssl.create_default_context()


@functools.cache
def _blocking() -> httpx.Client:
    """Not used; without it, each ChatOpenAI makes one of its own."""
    return httpx.Client()
