"""Chats -> rows for supervised training: the tokens that the engine would sample, by the model's own chat template.

For each message of the assistant, the template renders the messages before it with the opening of a reply, as the
engine reads them, and the messages up to it. What the second text has beyond the first, to the end token, is learnt:

    prompt   <|im_start|>user\\n2 + 2?<|im_end|>\\n<|im_start|>assistant\\n
    learnt                                                                 4<|im_end|>

A chat for which this is not possible is left out, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from agent_lightning.core.text import error_line
from agent_lightning.core.types import ModelCall, Outcome, RolloutKey, Sample, Task, Trajectory
from agent_lightning.credit.samples import to_samples

_SYSTEM: Final = ("system", "developer")
_BEFORE: Final[Mapping[str, Collection[str]]] = {
    "system": ("", *_SYSTEM),
    "developer": ("", *_SYSTEM),
    "user": ("", *_SYSTEM, "assistant"),
    "assistant": (*_SYSTEM, "user", "tool"),
    "tool": ("tool calls", "tool"),
}
"""The roles that a message may follow: "" is the start of a chat, "tool calls" an assistant that calls tools."""
_PROBE: Final[Mapping[str, Any]] = json.loads("""{
"tools": [{"type": "function", "function": {"name": "agl_tool", "description": "-", "parameters": {"properties": {}}}}],
"messages": [{"role": "user", "content": "-"}, {"role": "assistant", "content": "", "tool_calls": [
{"id": "agl000000", "type": "function", "function": {"name": "agl_call", "arguments": {"a": "agl_value"}}}]},
{"role": "tool", "tool_call_id": "agl000000", "name": "agl_call", "content": "agl_result"}]}""")
_MARKS: Final = {"tools": {"agl_tool"}, "tool calls": {"agl_call", "agl_value"}, "results of tools": {"agl_result"}}
"""What a template must show of the first, first two and all three messages of the probe; else it drops this."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat that can be learnt."""

    samples: tuple[Sample, ...]
    """Its rows: several if the template renders earlier messages otherwise once later messages follow."""

    @property
    def tokens(self) -> int:
        """The number of tokens that are learnt."""
        return sum(int(sample.mask_T.sum()) for sample in self.samples)


class BadChat(ValueError):
    """A chat that cannot be learnt; the message is the reason."""


class ChatEncoder:
    """Renders chats by the template of a model."""

    def __init__(self, model: str, end_tokens: Collection[int], max_len: int) -> None:
        """`model`: its folder. `end_tokens`: the tokens that end a reply. `max_len`: the most tokens of a row."""
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self._ends = {*end_tokens, self._tokenizer.eos_token_id}
        self._max_len = max_len
        self._lost = self._lost_by_template()

    def encode_all(self, tasks: Sequence[Task]) -> tuple[list[Chat], dict[str, list[str]]]:
        """The chats that can be learnt; and the ids of the others by the reason."""
        chats: list[Chat] = []
        refused: dict[str, list[str]] = {}
        for number, task in enumerate(tasks):
            try:
                chats.append(Chat(self.encode(task, number)))
            except BadChat as error:
                refused.setdefault(str(error), []).append(task.task_id)
        return chats, refused

    def encode(self, task: Task, number: int) -> tuple[Sample, ...]:
        """The rows of a chat {"messages": [...], "tools": [...]}. Raises BadChat."""
        messages, tools = _messages(task.payload), task.payload.get("tools") or None
        used = {"tools"} if tools else set()
        used |= {"tool calls" for message in messages if "tool_calls" in message}
        used |= {"results of tools" for message in messages if message["role"] == "tool"}
        if lost := sorted(used & self._lost):
            raise BadChat(f"the model's chat template drops {' and '.join(lost)}")
        key = RolloutKey(split="train", group=number, index=0)
        ends = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        calls = [self._call(key, messages[: end + 1], tools) for end in ends if messages[end].get("weight") != 0]
        trajectory = Trajectory(key=key, task_id="", calls=tuple(calls), reward=None, outcome=Outcome.FINISHED)
        zeros = np.zeros(len(calls), np.float32)
        samples, dropped = to_samples(trajectory, calls, zeros, zeros, max_tokens=self._max_len)
        if dropped:
            raise BadChat(f"longer than model.max_len={self._max_len} tokens")
        if not samples:
            raise BadChat("no message of the assistant to learn")
        return samples

    def _call(self, key: RolloutKey, messages: list[dict[str, Any]], tools: Any) -> ModelCall:
        """The call by which the engine would have sampled the last message. Raises BadChat."""
        prompt = self._render(messages[:-1], tools, add_generation_prompt=True)
        rendered = self._render(messages, tools)
        if rendered[: len(prompt)] != prompt:
            raise BadChat("the chat template renders a reply otherwise than after its prompt")
        reply = rendered[len(prompt) :]
        end = next((i for i, token in enumerate(reply) if token in self._ends), None)
        if end is None:
            raise BadChat("the chat template does not close a reply with an end token of the model")
        tokens: Any = {"prompt_T": np.array(prompt, np.int32), "response_T": np.array(reply[: end + 1], np.int32)}
        tokens["logprob_T"] = np.zeros(end + 1, np.float32)
        names: Any = {"key": key, "call_id": "", "agent": "", "policy_version": 0, "finish_reason": "stop"}
        return ModelCall(**names, **tokens, started_at=0.0, ended_at=0.0)

    def _render(self, messages: Sequence[Any], tools: Any, **settings: Any) -> list[int]:
        text = self._text(messages, tools, **settings)
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _text(self, messages: Sequence[Any], tools: Any, **settings: Any) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **settings))
        except Exception as error:  # a template is a program, and raises what it likes
            raise BadChat(f"the chat template refuses it: {error_line(error)}") from error

    def _lost_by_template(self) -> set[str]:
        """What the template leaves out without a word."""
        lost = set()
        for end, (what, marks) in enumerate(_MARKS.items(), start=1):
            with suppress(BadChat):  # what it refuses is not lost without a word
                text = self._text(_PROBE["messages"][:end], _PROBE["tools"])
                lost |= {what} if any(mark not in text for mark in marks) else set()
        return lost


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row to the assistant's last, as engines hand them to templates. Raises BadChat."""
    given = row.get("messages")
    if not isinstance(given, list) or not all(isinstance(message, Mapping) for message in given):
        raise BadChat('no {"messages": [...]}')
    before, messages, end = "", [], 0
    for message in given:
        role = message.get("role")
        if role not in _BEFORE:
            raise BadChat(f"unknown role {role!r}")
        if before not in _BEFORE[role]:
            raise BadChat(f"roles do not alternate: {role} {f'after {before}' if before else 'at the start'}")
        messages.append(_message(message))
        before = "tool calls" if "tool_calls" in messages[-1] else role
        end = len(messages) if role == "assistant" else end
    return messages[:end]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with its content as text, and arguments of tool calls as objects. Raises BadChat."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        content = "\n".join(map(str, parts)) if None not in parts else parts
    if not isinstance(content, str | None):
        raise BadChat("content that is not text")
    calls = message.get("tool_calls") or []
    if message.get("role") == "assistant" and not calls and not content:
        raise BadChat("an empty message of the assistant")
    rest = {name: value for name, value in message.items() if name not in ("content", "tool_calls")}
    return rest | {"content": content or ""} | ({"tool_calls": [_tool_call(call) for call in calls]} if calls else {})


def _tool_call(call: Any) -> dict[str, Any]:
    try:
        function = call["function"]
        arguments = function.get("arguments") or {}
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        if isinstance(function["name"], str) and isinstance(arguments, dict):
            return {**call, "function": {**function, "arguments": arguments}}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise BadChat("a tool call without a name, or whose arguments are no JSON object")
