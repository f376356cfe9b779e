"""An agent with a calculator: plain `openai` code, as any user would write it.

It knows nothing of the training. `policy` is any object with `base_url`, `api_key` and `model`:

    await solve({"question": "What is 14 plus 3?"}, policy)  # "The answer is 17."
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Generator, Mapping
from typing import Any, Protocol

from calculator import SYSTEM, TOOL, call
from compare import parse_answer
from openai import AsyncOpenAI, DefaultAioHttpClient, DefaultAsyncHttpxClient, OpenAI
from openai.types.chat import ChatCompletionMessage

MAX_TURNS = 4
TIMEOUT = 600.0
"""Seconds for one reply: the engine may be busy with a thousand others."""

Messages = list[Any]
"""OpenAI message dicts."""

Conversation = Generator[Messages, ChatCompletionMessage, str]
"""Yields the messages to send, is sent the reply, returns the final text."""


class Policy(Protocol):
    """Where the model is. The training passes such an object; the agent needs no more than this."""

    @property
    def base_url(self) -> str: ...
    @property
    def api_key(self) -> str: ...
    @property
    def model(self) -> str: ...


async def solve(task: Mapping[str, Any], policy: Policy, *, role: str | None = None) -> str:
    """Answer the question of a task; the text of the last turn. `role`: the agent's name. Raises openai.APIError."""
    return await _talk(conversation(task["question"]), policy, role)


async def solve_to_result(task: Mapping[str, Any], policy: Policy) -> str:
    """Answer with the calculator's first result, which the model is not asked to repeat. Raises openai.APIError.

    AutoGen's AssistantAgent does so unless it is told otherwise, and the OpenAI Agents SDK with "stop_on_first_tool".
    """
    return await _talk(conversation(task["question"], to_result=True), policy)


async def _talk(talk: Conversation, policy: Policy, role: str | None = None) -> str:
    """Hold a conversation with the policy; the final text."""
    names = {"x-agl-agent": role} if role else {}
    client = (await _shared_client()).with_options(
        base_url=policy.base_url, api_key=policy.api_key, default_headers=names
    )
    messages = next(talk)
    while True:
        reply = await client.chat.completions.create(model=policy.model, messages=messages, tools=[TOOL])
        try:
            messages = talk.send(reply.choices[0].message)
        except StopIteration as end:
            return str(end.value)


async def solve_sheet(task: Mapping[str, Any], policy: Policy) -> list[str]:
    """Answer a sheet of questions one after the other, each in a conversation of its own. Raises openai.APIError."""
    return [await solve(row, policy) for row in task["rows"]]


async def solve_team(task: Mapping[str, Any], policy: Policy) -> str:
    """A writer answers, a checker does so by itself, and where they differ a rewriter has the last word."""
    written, checked = await asyncio.gather(solve(task, policy, role="writer"), solve(task, policy, role="checker"))
    if parse_answer(written) == parse_answer(checked):
        return written
    return await solve(task, policy, role="rewriter")


def solve_blocking(task: Mapping[str, Any]) -> str:
    """The same in a process of its own: OPENAI_BASE_URL, OPENAI_API_KEY and AGL_MODEL say where the model is."""
    with OpenAI(timeout=TIMEOUT, max_retries=2) as client:
        talk = conversation(task["question"])
        messages = next(talk)
        while True:
            reply = client.chat.completions.create(model=os.environ["AGL_MODEL"], messages=messages, tools=[TOOL])
            try:
                messages = talk.send(reply.choices[0].message)
            except StopIteration as end:
                return str(end.value)


def conversation(question: str, *, to_result: bool = False) -> Conversation:
    """The agent without its transport: yields the messages to send, is sent the reply, returns the final text.

    A reply with tool calls is answered with their results; the model is asked at most MAX_TURNS times in all.
    `to_result` ends the conversation with the first result of the calculator; an error goes back to the model.
    """
    messages: Messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    for _ in range(MAX_TURNS):
        reply = yield list(messages)
        if not reply.tool_calls:
            break
        messages.append(_sent_back(reply))
        results = [_run(tool_call) for tool_call in reply.tool_calls]
        messages.extend(results)
        if to_result and not results[-1]["content"].startswith("error: "):
            return str(results[-1]["content"])
    return reply.content or ""


def _sent_back(reply: ChatCompletionMessage) -> dict[str, Any]:
    """The assistant's message as the API takes it back, without fields that only replies have."""
    known: Any = {"role": True, "content": True, "tool_calls": {"__all__": {"id", "type", "function"}}}
    return reply.model_dump(include=known, exclude_none=True)


def _run(tool_call: Any) -> dict[str, Any]:
    """The tool message that answers one tool call; mistakes are told to the model."""
    if tool_call.type != "function" or tool_call.function.name != "calculator":
        content = "error: the only tool is calculator"
    else:
        content = call(tool_call.function.arguments)
    return {"role": "tool", "tool_call_id": tool_call.id, "content": content}


_clients: dict[asyncio.AbstractEventLoop, tuple[AsyncOpenAI, AsyncGenerator[None, None]]] = {}
"""One client per running event loop, because connections belong to their loop; with what closes it."""


async def _shared_client() -> AsyncOpenAI:
    """The client of the running loop. A client costs many milliseconds and its connections, so rollouts share one.

    aiohttp where it is installed: httpx slows down beyond about 100 requests in flight.
    Both allow 1000 connections, the default of openai's clients.
    """
    loop = asyncio.get_running_loop()
    if loop not in _clients:
        try:
            transport = DefaultAioHttpClient()
        except RuntimeError:  # openai says so where aiohttp is missing
            transport = DefaultAsyncHttpxClient()
        # The address is the policy's, set for each rollout.
        client = AsyncOpenAI(
            base_url="http://unset.invalid", api_key="unset", http_client=transport, timeout=TIMEOUT, max_retries=2
        )
        closer = _close_with(loop, client)
        _clients[loop] = client, closer
        await anext(closer)
    return _clients[loop][0]


async def _close_with(loop: asyncio.AbstractEventLoop, client: AsyncOpenAI) -> AsyncGenerator[None, None]:
    """Close the client when the loop ends: `asyncio.run` then closes the generators that were begun in it."""
    try:
        yield
    finally:
        del _clients[loop]
        await client.close()
