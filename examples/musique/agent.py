"""An agent that searches before it answers: OpenAI Agents SDK code, as any user of it would write it.

It thinks, and then either asks for passages or answers, in tags:

    <think>…</think><query>singer of The Doors</query>      -> the passages found come back as the user's turn
    <think>…</think><answer>Jim Morrison</answer>

Passages come from the retrieval service at MUSIQUE_SEARCH_URL (`python -m retrieval serve`), or where that is not set
from the paragraphs that come with the question, as in MuSiQue's own setting.
"""

from __future__ import annotations

import functools
import os
import re
import ssl
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import httpx
from agents import Agent, OpenAIChatCompletionsModel, RunConfig, Runner
from openai import AsyncOpenAI
from retrieval.corpus import Passage

from agent_lightning.rollouts.client import tool

INSTRUCTIONS = """\
Answer the question with the help of a search engine for Wikipedia. In each turn, first think between <think> and \
</think>. Then either search, with <query>what to look for</query>, and you are given the passages found; or, when \
you know enough, answer with <answer>a few words</answer>."""
SHORT_INSTRUCTIONS = "Search, then answer."
MAX_TURNS = 5
PASSAGES = 3
SHORT_WORDS = 32
"""Words that `solve_short` shows of its passage."""
MAX_QUERY = 400
"""Characters: what a policy asks for beyond them is noise, and the service would refuse much more."""
TIMEOUT = 600.0
"""Seconds for one reply: the engine may be busy with a thousand others."""
_QUERY = re.compile(r"<query>(.*?)</query>", re.DOTALL)


class Policy(Protocol):
    """Where the model is. The training passes such an object; the agent needs no more than this."""

    @property
    def base_url(self) -> str: ...
    @property
    def api_key(self) -> str: ...
    @property
    def model(self) -> str: ...


async def solve(task: Mapping[str, Any], policy: Policy) -> list[str]:
    """Answer a task's question; what the agent said, turn by turn. Raises openai.APIError, httpx.HTTPError."""
    return await run(task, policy, instructions=INSTRUCTIONS, passages=PASSAGES)


async def solve_short(task: Mapping[str, Any], policy: Policy) -> list[str]:
    """The same for a model that reads little: short instructions, and of each search the opening of one passage."""
    return await run(task, policy, instructions=SHORT_INSTRUCTIONS, passages=1, words=SHORT_WORDS)


async def run(
    task: Mapping[str, Any], policy: Policy, *, instructions: str, passages: int, words: int | None = None
) -> list[str]:
    """The agent's loop: a turn of the model, then what it searched for, until it answers or has had MAX_TURNS.

    `words`: how far a passage is shown; None is all of it.
    """
    turns: list[str] = []
    async with (
        httpx.AsyncClient(verify=_certificates(), timeout=TIMEOUT) as http,
        AsyncOpenAI(base_url=policy.base_url, api_key=policy.api_key, http_client=http, max_retries=2) as client,
    ):
        model = OpenAIChatCompletionsModel(policy.model, client)
        agent = Agent(name="searcher", instructions=instructions, model=model)
        talk: list[Any] = [{"role": "user", "content": task["question"]}]
        while len(turns) < MAX_TURNS:
            result = await Runner.run(agent, talk, run_config=RunConfig(tracing_disabled=True))
            turns.append(str(result.final_output))
            queries = _QUERY.findall(turns[-1])
            if not queries:
                break
            query = queries[0].strip()[:MAX_QUERY]
            with tool("search", {"query": query}) as span:
                span.result = shown = render(await search(task, query, passages, http), words)
            talk = [*result.to_input_list(), {"role": "user", "content": shown}]
    return turns


async def search(task: Mapping[str, Any], query: str, k: int, http: httpx.AsyncClient) -> list[Passage]:
    """At most k passages, best first, from the service or from the task's own paragraphs."""
    url = os.environ.get("MUSIQUE_SEARCH_URL")
    if url is None:
        return search_paragraphs(task["paragraphs"], query, k)
    reply = (await http.post(url, json={"query": query, "k": k})).raise_for_status().json()
    return [
        Passage(doc_id=passage["doc_id"], title=passage["title"], text=passage["text"]) for passage in reply["passages"]
    ]


def search_paragraphs(paragraphs: Sequence[Mapping[str, Any]], query: str, k: int) -> list[Passage]:
    """BM25 over a question's own paragraphs."""
    from retrieval.sparse import best

    texts = tuple(Passage(doc_id=str(p["idx"]), title=p["title"], text=p["paragraph_text"]) for p in paragraphs)
    (hits,) = best(_index(texts), [query], k)
    return [texts[number] for number, _ in hits]


@functools.lru_cache(maxsize=256)
def _index(texts: tuple[Passage, ...]) -> Any:
    """Kept for the other rollouts of the same question."""
    from retrieval.sparse import index_of

    return index_of(texts)


def render(passages: Sequence[Passage], words: int | None = None) -> str:
    """The passages as the model reads them, so many words of each: "(1) Oslo: Oslo is the capital …"."""
    if not passages:
        return "Nothing found."
    texts = [passage.text if words is None else " ".join(passage.text.split()[:words]) for passage in passages]
    titled = zip(passages, texts, strict=True)
    return "\n".join(f"({number}) {passage.title}: {text}" for number, (passage, text) in enumerate(titled, start=1))


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Loading them takes longer than all else that a client does, so all rollouts share them."""
    return ssl.create_default_context()
