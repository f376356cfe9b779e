"""The same conversation in each wire format, through the official client libraries."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import openai

if TYPE_CHECKING:
    import anthropic

ARGUMENTS = {"type": "object", "properties": {"expression": {"type": "string"}}}
FUNCTION = {"name": "calculator", "description": "Computes.", "parameters": ARGUMENTS}
NO_RETRIES = {"api_key": "any", "max_retries": 0, "timeout": 60.0}


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What an agent sees of one reply."""

    reply_id: str
    text: str
    calls: list[tuple[str, dict[str, Any]]]
    """Name and arguments of each tool call."""
    reason: str
    history: list[Any]
    """What the agent sends back in its next body."""
    ids: list[str] = field(default_factory=list)
    """Of the tool calls."""
    pieces: int = 0
    """In which the text came, where it was streamed."""


@dataclass(kw_only=True)
class Clients:
    """Official clients of one rollout. `root`: the gateway's URL up to the agent's name."""

    root: str
    openai: openai.AsyncOpenAI = None  # type: ignore[assignment]
    anthropic: anthropic.AsyncAnthropic = None  # type: ignore[assignment]
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def __aenter__(self) -> Clients:
        import anthropic  # two seconds: here, and not when the tests are collected

        self.openai = openai.AsyncOpenAI(base_url=f"{self.root}/v1", **NO_RETRIES)  # type: ignore[arg-type]
        self.anthropic = anthropic.AsyncAnthropic(base_url=self.root, **NO_RETRIES)  # type: ignore[arg-type]
        for client in (self.openai, self.anthropic):
            await self._stack.enter_async_context(client)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def of(self, root: str) -> Clients:
        """The same connections for another rollout."""
        return Clients(
            root=root,
            openai=self.openai.with_options(base_url=f"{root}/v1"),
            anthropic=self.anthropic.with_options(base_url=root),
        )


async def chat(
    clients: Clients, history: Sequence[Any], *, tools: bool, stream: bool, system: str = "", **extra: Any
) -> Turn:
    told = [{"role": "system", "content": system}] if system else []
    body = {"model": "policy", "messages": [*told, *history], **extra}
    if tools:
        body["tools"] = [{"type": "function", "function": FUNCTION}]
    pieces = 0
    if stream:
        async with clients.openai.chat.completions.stream(**body) as events:
            async for event in events:
                pieces += event.type == "content.delta"
            reply: Any = await events.get_final_completion()
    else:
        reply = await clients.openai.chat.completions.create(**body)
    (choice,) = reply.choices
    called = choice.message.tool_calls or []
    message = {"role": "assistant", "content": choice.message.content}
    if called:
        message["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.function.name, "arguments": c.function.arguments}}
            for c in called
        ]
    return Turn(
        reply_id=reply.id,
        text=choice.message.content or "",
        calls=[(c.function.name, json.loads(c.function.arguments)) for c in called],
        reason=choice.finish_reason,
        history=[*history, message],
        ids=[c.id for c in called],
        pieces=pieces,
    )


async def responses(
    clients: Clients, history: Sequence[Any], *, tools: bool, stream: bool, system: str = "", **extra: Any
) -> Turn:
    body = {"model": "policy", "input": list(history), "instructions": system or None, **extra}
    if tools:
        body["tools"] = [{"type": "function", **FUNCTION}]
    pieces = 0
    if stream:
        async with clients.openai.responses.stream(**body) as events:
            async for event in events:
                pieces += event.type == "response.output_text.delta"
            reply: Any = await events.get_final_response()
    else:
        reply = await clients.openai.responses.create(**body)
    called = [item for item in reply.output if item.type == "function_call"]
    reason = "tool_calls" if called else {"completed": "stop", "incomplete": "length"}[reply.status]
    return Turn(
        reply_id=reply.id,
        text=reply.output_text,
        calls=[(c.name, json.loads(c.arguments)) for c in called],
        reason=reason,
        history=[*history, *(item.model_dump(exclude_none=True) for item in reply.output)],
        ids=[c.call_id for c in called],
        pieces=pieces,
    )


async def messages(
    clients: Clients, history: Sequence[Any], *, tools: bool, stream: bool, system: str = "", **extra: Any
) -> Turn:
    body = {"model": "policy", "max_tokens": 256, "messages": list(history), "extra_body": extra}
    if system:
        body["system"] = system
    if tools:
        body["tools"] = [{"name": FUNCTION["name"], "description": FUNCTION["description"], "input_schema": ARGUMENTS}]
    pieces = 0
    if stream:
        async with clients.anthropic.messages.stream(**body) as events:
            async for _ in events.text_stream:
                pieces += 1
            reply: Any = await events.get_final_message()
    else:
        reply = await clients.anthropic.messages.create(**body)
    called = [block for block in reply.content if block.type == "tool_use"]
    reasons = {"end_turn": "stop", "tool_use": "tool_calls", "max_tokens": "length", "stop_sequence": "stop"}
    message = {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in reply.content]}
    return Turn(
        reply_id=reply.id,
        text="".join(block.text for block in reply.content if block.type == "text"),
        calls=[(c.name, dict(c.input)) for c in called],
        reason=reasons[reply.stop_reason],
        history=[*history, message],
        ids=[c.id for c in called],
        pieces=pieces,
    )


Format = Callable[..., Awaitable[Turn]]
FORMATS: Mapping[str, Format] = {"chat": chat, "responses": responses, "messages": messages}


def results_of(name: str, turn: Turn, results: Sequence[str]) -> list[Any]:
    """The history with the results of a turn's tool calls, as a format has them."""
    pairs = list(zip(turn.ids, results, strict=True))
    match name:
        case "chat":
            told: list[Any] = [{"role": "tool", "tool_call_id": i, "content": result} for i, result in pairs]
        case "responses":
            told = [{"type": "function_call_output", "call_id": i, "output": result} for i, result in pairs]
        case _:
            blocks = [{"type": "tool_result", "tool_use_id": i, "content": result} for i, result in pairs]
            told = [{"role": "user", "content": blocks}]
    return [*turn.history, *told]


async def converse(
    clients: Clients, name: str, question: str, *, tools: bool, stream: bool, turns: int = 3, **extra: Any
) -> list[Turn]:
    """Ask, run the tools, and ask again, as an agent does."""
    turns_taken: list[Turn] = []
    history: list[Any] = [{"role": "user", "content": question}]
    for _ in range(turns):
        turns_taken.append(await FORMATS[name](clients, history, tools=tools, stream=stream, **extra))
        if not turns_taken[-1].calls:
            break
        history = results_of(name, turns_taken[-1], ["5" for _ in turns_taken[-1].calls])
    return turns_taken
