"""Conversations that a model's server keeps: a request has the new messages only, and the id of what it continues.

OpenAI's Responses (`previous_response_id`, `conversation`) and Assistants (a thread) are such servers. The messages
before are in earlier calls of the same trace, or nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agent_lightning.spans.fields import Request, dump
from agent_lightning.spans.message_forms import Message
from agent_lightning.spans.messages import begins_midway

_LONGEST_OWN_ID = 20
"""Most characters of an id that OpenAI has not given: its ids have 29 and more."""
_MAX_JOINED = 2**25
"""Most characters of all joined requests of a trace: each repeats the conversation before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A model call of a trace."""

    call_id: str
    request: Request
    reply: Message | None


def whole_requests(turns: Sequence[Turn]) -> list[tuple[list[Message], bool]]:
    """The messages that the model has seen in each of the `turns`, which are in the order of time; and whether these
    are all of them. A request is put behind the earlier turn whose reply id it names, or whose conversation, or whose
    reply requested the tool call that it answers.

    Example: the reply "resp_1" to the request [user] has a tool call; the next request is [tool] with previous="resp_1"
    -> ([user, assistant, tool], True) for the next turn.
    """
    result: list[tuple[list[Message], bool]] = []
    by_id: dict[str, int] = {}  # id of a reply or a conversation -> its latest turn
    by_tool_call: dict[str, int] = {}  # id of a tool call -> the turn that requested it, or -1 if there are several
    joined_length = 0
    for index, turn in enumerate(turns):
        request, messages = turn.request, turn.request.messages
        midway = begins_midway(messages)
        own_system = messages[:1] if messages and messages[0]["role"] == "system" else []
        before = by_id.get(request.previous, -1)
        if before < 0 and midway:
            before = by_tool_call.get(midway, -1)
        # Who sends the history, or asks for something else, does not rely on the server.
        followed = by_id.get(request.conversation, -1) if before < 0 else -1
        sends_history = any(message["role"] == "assistant" for message in messages)
        follows = followed >= 0 and not sends_history and (not own_system or result[followed][0][:1] == own_system)
        # Short ids are an agent's own: whether a server keeps its messages is unknown.
        before = followed if follows and len(request.conversation) > _LONGEST_OWN_ID else before
        is_whole = not midway and not request.previous and not follows
        if before >= 0 and (earlier := turns[before].reply) is not None:
            history = [*result[before][0], earlier]
            if messages[: len(history)] == history:
                is_whole = not midway
            elif joined_length <= _MAX_JOINED:
                history = history[1:] if own_system and history[0]["role"] == "system" else history
                messages = [*own_system, *history, *messages[len(own_system) :]]
                is_whole = result[before][1] and not begins_midway(messages)
                joined_length += len(dump(messages))
        result.append((messages, is_whole))
        by_id |= dict.fromkeys(filter(None, (turn.call_id, request.conversation)), index)
        for call in (turn.reply or {}).get("tool_calls", ()):
            by_tool_call[call["id"]] = -1 if by_tool_call.get(call["id"], index) != index else index
    return result
