"""Automatic Intermediate Rewarding (AIR): the events of a rollout become a reward for each of its calls.

The idea is from arXiv 2508.03680, section 3.3: signals that a running system has anyway, such as the status of a tool
call, become intermediate rewards. The paper gives no formula. The formula here is our own, built so that a policy
cannot exploit it (see `Air`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from agent_lightning.config.learning import AirConfig, RuleConfig
from agent_lightning.core.errors import ConfigError
from agent_lightning.core.types import Floats, Trajectory
from agent_lightning.credit.tools import canonical_arguments, looks_like_tool_call


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedEvent:
    """An event of a rollout, and the call that caused it."""

    call: int
    """Index of the model call that caused the event."""
    kind: str
    """One of config.learning.AirEvent."""
    tool: str = ""
    """The tool's name; "" if the event is about a reply."""
    text: str = ""
    """The tool's result; the reply if there is no tool."""


Signal = Callable[[Trajectory], Floats]
"""A user's own function from an attempt to a reward for each of its calls, before the bound is applied."""


@dataclass(frozen=True, slots=True)
class Air:
    """The rules by which events become rewards; a policy cannot exploit them.

    - An action that occurred before in the rollout (same tool, same arguments) is "repeated", whatever its result: only
      a rule for repetition can reward it, and such a rule may not be positive.
    - A rule pays at most `cap` in a rollout, and all rules together stay within [-bound, bound].
    - `bound` is below half the range of the final reward, so a failed rollout cannot overtake a successful one.
    - form="potential" uses the running total as a potential: the rewards of a rollout sum to exactly zero.

    Example, bound 0.3, the default rules, three calls: a failing tool call, the same call again, a good call:

        events            error   repeated    ok
        rules             -0.05      -0.05  +0.10
        form="sum"        -0.05      -0.05  +0.10    what each call gets
        form="potential"  -0.05      -0.05  +0.10    potential after each call: -0.05, -0.1, 0
    """

    config: AirConfig = AirConfig(enabled=True)
    signals: tuple[Signal, ...] = ()
    """Functions that add to the rewards of the rules."""

    def worth(self, trajectory: Trajectory) -> list[tuple[ObservedEvent, float]]:
        """The events of an attempt, and what the rules pay for each: 0 without a rule, and beyond the rule's cap."""
        paid: list[tuple[ObservedEvent, float]] = []
        spent: dict[RuleConfig, float] = {}
        for event in observed_events(trajectory):
            rule = next((rule for rule in self.config.rules if _applies(rule, event)), None)
            if rule is None or spent.get(rule, 0.0) + abs(rule.value) > rule.cap + 1e-9:
                paid.append((event, 0.0))
                continue
            spent[rule] = spent.get(rule, 0.0) + abs(rule.value)
            paid.append((event, rule.value))
        return paid

    def rewards(self, trajectory: Trajectory, *, reward_range: float = 1.0, discount: float = 1.0) -> Floats:
        """The intermediate reward of each call; shape [len(trajectory.calls)].

        P[t] is the sum of all rewards up to call t, clipped to [-bound, bound] * reward_range after each call.
        "sum": call t gets P[t] - P[t-1]. "potential": P is the potential, 0 before the first call and after the last,
        and call t gets discount * P[t] - P[t-1]. The discounted sum over the rollout is zero, so policies are ordered
        by the final reward alone (Ng, Harada and Russell, 1999, theorem 1). Raises ConfigError if a signal does not
        return a finite number for each call.
        """
        raw_T = np.zeros(len(trajectory.calls), np.float64)
        for event, value in self.worth(trajectory):
            raw_T[event.call] += value
        for signal in self.signals:
            name = getattr(signal, "__name__", type(signal).__name__)
            try:
                reward_T = np.asarray(signal(trajectory), np.float64)
            except Exception as error:  # a user's code may raise anything
                raise ConfigError(f"air.signals: {name} raised {type(error).__name__}: {error}") from error
            if reward_T.shape != raw_T.shape or not np.isfinite(reward_T).all():
                raise ConfigError(f"air.signals: {name} must return {raw_T.size} finite numbers, one for each call")
            raw_T += reward_T
        bounded_T = bounded(raw_T, self.config.bound * reward_range)
        if self.config.form == "sum":
            return np.asarray(bounded_T, np.float32)
        after_T = np.cumsum(bounded_T)
        before_T = np.concatenate(([0.0], after_T))[:-1]
        after_T[-1:] = 0.0
        return np.asarray(discount * after_T - before_T, np.float32)


def bounded(reward_T: NDArray[np.floating], limit: float) -> NDArray[np.float64]:
    """The rewards of a rollout's calls, cut so that their running total stays within [-limit, limit].
    Example: bounded([0.2, 0.2, -0.1], 0.3) -> [0.2 0.1 -0.1]"""
    totals = accumulate(reward_T.tolist(), lambda total, value: min(limit, max(-limit, total + value)), initial=0.0)
    return np.diff(np.fromiter(totals, np.float64, reward_T.size + 1))


def _applies(rule: RuleConfig, event: ObservedEvent) -> bool:
    """Whether the rule rewards this event."""
    if event.kind != rule.on or not fnmatchcase(event.tool, rule.tool):
        return False
    return not rule.match or re.search(rule.match, event.text, re.IGNORECASE) is not None


def observed_events(trajectory: Trajectory) -> tuple[ObservedEvent, ...]:
    """All events of an attempt, in the order of its calls."""
    index = {call.call_id: i for i, call in enumerate(trajectory.calls)}
    events: list[ObservedEvent] = []
    done: set[tuple[str, str]] = set()
    for tool in trajectory.tools:
        action = tool.name, canonical_arguments(tool.arguments)
        kind = "repeated" if action in done else tool.status.value
        done.add(action)
        if tool.call_id in index:
            events.append(ObservedEvent(call=index[tool.call_id], kind=kind, tool=tool.name, text=tool.result))
    for i, call in enumerate(trajectory.calls):
        if call.source != "gateway":  # a call of another model, which is not trained
            continue
        if looks_like_tool_call(call):
            events.append(ObservedEvent(call=i, kind="unparsed", text=call.reply))
        if call.finish_reason == "length":
            events.append(ObservedEvent(call=i, kind="cut", text=call.reply))
    return tuple(sorted(events, key=lambda event: event.call))
