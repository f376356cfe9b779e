"""Automatic Intermediate Rewarding (AIR): what the system saw of a rollout -> a reward for each of its calls. Pure.

The idea is of arXiv 2508.03680, section 3.3: signals such as the status of a tool call, which a running system has
anyway, become intermediate rewards. The paper gives no formula; this is ours, made so that it cannot be farmed:

    - An action that was done before in the rollout (the same tool, the same arguments) is "repeated", whatever its
      result: only a rule for repetition can pay for it, and such a rule may not be positive.
    - A rule pays at most `cap` in a rollout, and all rules together stay within [-bound, bound].
    - `bound` is below half the range of the final reward, so no rollout that failed can overtake one that succeeded.
    - form="potential" takes the running total as a potential: its sum over the rollout is exactly zero.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from agent_lightning.core.errors import ConfigError
from agent_lightning.core.types import Floats, ModelCall, ToolCall, ToolStatus, Trajectory
from agent_lightning.credit.tools import canonical, looks_like_tool_call

REPEATED: Final = "repeated"
UNPARSED: Final = "unparsed"
CUT: Final = "cut"
EVENTS: Final = (*(status.value for status in ToolStatus), REPEATED, UNPARSED, CUT)
"""What a rule can be about: how a tool call went, or what was wrong with a reply."""

Form = Literal["sum", "potential"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that the system saw a call do."""

    call: int
    """Index of the model call that caused it."""
    kind: str
    """One of EVENTS."""
    tool: str = ""
    text: str = ""
    """The tool's result; the reply where there is no tool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What an event is worth.

    Example: Rule(on="error", tool="sql*", match="no such table", value=-0.1, cap=0.2)
    """

    on: str
    value: float
    cap: float
    """Most that the rule may give or take in a rollout, as a size."""
    tool: str = "*"
    """Glob over tool names."""
    match: str = ""
    """Regular expression searched for in the event's text, whatever the case."""

    def __post_init__(self) -> None:
        if self.on not in EVENTS:
            raise ConfigError(f"air.rules: on={self.on}: must be one of {', '.join(EVENTS)}")
        if not (np.isfinite(self.value) and np.isfinite(self.cap) and self.cap >= abs(self.value) > 0):
            raise ConfigError(f"air.rules: on={self.on}: needs a value that is not 0 and a cap of at least its size")
        if self.on == REPEATED and self.value > 0:
            raise ConfigError("air.rules: on=repeated: the value must be below 0, or repeating an action would pay")
        try:
            re.compile(self.match)
        except re.error as error:
            raise ConfigError(f"air.rules: match={self.match}: not a regular expression ({error})") from error

    def applies(self, event: Event) -> bool:
        """Whether the rule is about this event."""
        return (
            event.kind == self.on
            and fnmatchcase(event.tool, self.tool)
            and (not self.match or re.search(self.match, event.text, re.IGNORECASE) is not None)
        )


DEFAULT_RULES: Final = (
    Rule(on="ok", value=0.1, cap=0.3),
    Rule(on="error", value=-0.05, cap=0.1),
    Rule(on="invalid_arguments", value=-0.1, cap=0.2),
    Rule(on="timeout", value=-0.05, cap=0.1),
    Rule(on="repeated", value=-0.05, cap=0.1),
    Rule(on="unparsed", value=-0.1, cap=0.2),
    Rule(on="cut", value=-0.1, cap=0.2),
)
"""For a final reward of range 1. An empty or missing result says nothing of who is to blame, so it is worth nothing."""

Signal = Callable[[Trajectory], Floats]
"""A signal of one's own: an attempt -> a reward for each of its calls, before the bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Air:
    """How events become rewards.

    Example, bound 0.3, the default rules, three calls: a failing tool call, the same again, a good one:

        events            error   repeated    ok
        rules             -0.05      -0.05  +0.10
        form="sum"        -0.05      -0.05  +0.10    what each call gets
        form="potential"  -0.05      -0.05  +0.10    potential after each call: -0.05, -0.1, 0
    """

    rules: tuple[Rule, ...] = DEFAULT_RULES
    """The first rule that applies to an event counts."""
    bound: float = 0.3
    """Most that all rules together may give or take in a rollout, as a share of the final reward's range."""
    form: Form = "sum"
    signals: tuple[Signal, ...] = field(default=())

    def __post_init__(self) -> None:
        if not 0 < self.bound < 0.5:
            raise ConfigError(
                f"air.bound={self.bound}: must be above 0 and below 0.5: "
                "from half of the final reward's range on, a failed rollout could be worth more than a good one"
            )
        if self.form not in ("sum", "potential"):
            raise ConfigError(f"air.form={self.form}: must be sum or potential")

    def rewards(self, trajectory: Trajectory, *, reward_range: float = 1.0, discount: float = 1.0) -> Floats:
        """The intermediate reward of each call; shape [len(trajectory.calls)].

        "sum": what a call's events are worth, the running total P clipped to +-bound. "potential": with P as
        potential, 0 before the first call and after the last, call t gets discount * P[t] - P[t-1]. Its discounted
        sum over the rollout is zero, so the order of policies by return is that of the final reward alone
        (Ng, Harada and Russell, 1999, theorem 1).
        """
        total_T = _clipped_total(self._raw(trajectory), self.bound * reward_range)
        before_T = np.concatenate([np.zeros(1), total_T])[:-1]
        if self.form == "sum":
            return np.asarray(total_T - before_T, np.float32)
        after_T = total_T.copy()
        after_T[-1:] = 0.0
        return np.asarray(discount * after_T - before_T, np.float32)

    def _raw(self, trajectory: Trajectory) -> NDArray[np.float64]:
        """What rules and signals say, each rule within its cap; one number for each call."""
        raw_T = np.zeros(len(trajectory.calls), np.float64)
        spent: dict[Rule, float] = {}
        for event in events(trajectory):
            rule = next((rule for rule in self.rules if rule.applies(event)), None)
            if rule is None or spent.get(rule, 0.0) + abs(rule.value) > rule.cap + 1e-9:
                continue
            spent[rule] = spent.get(rule, 0.0) + abs(rule.value)
            raw_T[event.call] += rule.value
        for signal in self.signals:
            raw_T += _own(signal, trajectory)
        return raw_T


def events(trajectory: Trajectory) -> tuple[Event, ...]:
    """What the system saw in an attempt, in the order of its calls."""
    index = {call.call_id: i for i, call in enumerate(trajectory.calls)}
    found = [*_tool_events(trajectory.tools, index), *_reply_events(trajectory.calls)]
    return tuple(sorted(found, key=lambda event: event.call))


def _tool_events(tools: Sequence[ToolCall], index: Mapping[str, int]) -> Iterator[Event]:
    done: set[tuple[str, str]] = set()
    for tool in tools:
        action = tool.name, canonical(tool.arguments)
        kind = REPEATED if action in done else tool.status.value
        done.add(action)
        if tool.call_id in index:
            yield Event(call=index[tool.call_id], kind=kind, tool=tool.name, text=tool.result)


def _reply_events(calls: Sequence[ModelCall]) -> Iterator[Event]:
    for i, call in enumerate(calls):
        if call.source != "gateway":  # another model's: not ours to teach
            continue
        if looks_like_tool_call(call):
            yield Event(call=i, kind=UNPARSED, text=call.reply)
        if call.finish_reason == "length":
            yield Event(call=i, kind=CUT, text=call.reply)


def _clipped_total(raw_T: NDArray[np.float64], limit: float) -> NDArray[np.float64]:
    """Running total that stays within +-limit at every call."""
    total, totals = 0.0, np.empty(raw_T.shape, np.float64)
    for i, value in enumerate(raw_T):
        total = min(limit, max(-limit, total + value))
        totals[i] = total
    return totals


def _own(signal: Signal, trajectory: Trajectory) -> NDArray[np.float64]:
    """What a signal of one's own says. Raises ConfigError where that is not one finite number for each call."""
    name = getattr(signal, "__name__", type(signal).__name__)
    try:
        own = np.asarray(signal(trajectory), np.float64)
    except Exception as error:  # a user's code may raise anything
        raise ConfigError(f"air.signals: {name} raised {type(error).__name__}: {error}") from error
    if own.shape != (len(trajectory.calls),) or not np.isfinite(own).all():
        raise ConfigError(f"air.signals: {name} must return {len(trajectory.calls)} finite numbers, one for each call")
    return own
