"""Keys of the states in which calls were made: calls of other rollouts with the same key are compared (GiGPO)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Final

from agent_lightning.core.errors import ConfigError
from agent_lightning.core.json_values import parse_json
from agent_lightning.core.types import Trajectory
from agent_lightning.credit.tools import canonical_arguments

StateKey = Callable[[Trajectory], Sequence[Hashable]]
"""A function from an attempt to the state in which each of its calls was made."""


def prompt_keys(trajectory: Trajectory) -> list[Hashable]:
    """The agent and the tokens of its prompt: the same only if the conversations are the same from their start."""
    return [(call.agent, call.prompt_T.tobytes()) for call in trajectory.calls]


def shown_keys(trajectory: Trajectory) -> list[Hashable]:
    """The agent and what it was shown last: the messages after the last one of its own, without their ids.

    Example: [user "buy a pen", assistant calls search, tool "two pens"] -> the agent and "two pens"
    """
    keys: list[Hashable] = []
    for call in trajectory.calls:
        messages = parse_json(call.request)
        if not isinstance(messages, list) or not messages:
            keys.append((call.agent, call.request or call.prompt_T.tobytes()))
            continue
        shown = list[object]()
        for message in reversed(messages):
            fields = message if isinstance(message, Mapping) else {"content": message}
            if fields.get("role") == "assistant":
                break
            shown.append([fields.get("role"), fields.get("name"), fields.get("content")])
        keys.append((call.agent, json.dumps(shown)))
    return keys


def tool_keys(trajectory: Trajectory) -> list[Hashable]:
    """The agent and the tools that were used before the call: their names, arguments and results."""
    used: dict[str, list[Hashable]] = {}
    for tool in trajectory.tools:
        use = (tool.name, canonical_arguments(tool.arguments), tool.result)
        used.setdefault(tool.call_id, []).append(use)
    keys, history = list[Hashable](), tuple(used.pop("", ()))
    for call in trajectory.calls:
        keys.append((call.agent, history))
        history += tuple(used.get(call.call_id, ()))
    return keys


STATE_KEYS: Final[Mapping[str, StateKey]] = {"shown": shown_keys, "tools": tool_keys, "prompt": prompt_keys}
"""Values of credit.state_key -> the function."""


def state_keys(trajectory: Trajectory, function: StateKey) -> list[Hashable]:
    """The state of each call. Raises ConfigError if the function is a user's and gives no hashable value for each."""
    name = getattr(function, "__name__", type(function).__name__)
    try:
        keys = list(function(trajectory))
        hash(tuple(keys))
    except Exception as error:  # a user's code may raise anything
        raise ConfigError(f"credit.state_key: {name} raised {type(error).__name__}: {error}") from error
    if len(keys) != len(trajectory.calls):
        raise ConfigError(f"credit.state_key: {name} must return {len(trajectory.calls)} keys, one for each call")
    return keys


def shared(states_R: Sequence[Sequence[Hashable]]) -> list[bool]:
    """For each call, one rollout after the other, whether its state occurs in another rollout too.

    Example: shared([["a", "b", "b"], ["a"]]) -> [True, False, False, True]
    """
    rollouts = Counter(state for states in states_R for state in set(states))
    return [rollouts[state] > 1 for states in states_R for state in states]
