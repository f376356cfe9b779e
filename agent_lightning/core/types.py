"""The nouns of the system: frozen dataclasses over read-only NumPy arrays.

Shape legend, used as a suffix of names: `_T` tokens of one sequence, `_N` rows of a batch, `_G` groups,
`_R` rollouts of a group. `token_NT` has shape [N, T].

Arrays are made read-only on construction, because Ray hands them back read-only: a test on a laptop
then fails in the same way a cluster would.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
InFlight = Literal["wait", "keep", "restart"]
"""What becomes of a call that an update of the weights finds unfinished; see serving/gate.py."""
Split = Literal["train", "val"]
Source = Literal["gateway", "trace", "request"]
"""Where a span was seen: at the gateway; in a trace that the agent's side sent (OpenTelemetry); or in the next
request, whose tool messages answer the last reply."""


DEFAULT_AGENT = "agent"
"""The name in a rollout's URL where nobody chose another."""


class Outcome(StrEnum):
    """How a rollout ended. Exactly one for each admitted rollout."""

    FINISHED = "finished"
    """The agent returned and its reward is a number in the declared range."""
    AGENT_ERROR = "agent_error"
    """The agent raised, or its process exited with an error."""
    TOOL_ERROR = "tool_error"
    """The same, with an error that the config says is its surroundings' and not its own (agent.tool_errors)."""
    TIMEOUT = "timeout"
    """The deadline of the rollout passed."""
    NO_MODEL_CALL = "no_model_call"
    """The agent returned without one recorded call of the policy."""
    OVERLONG_PROMPT = "overlong_prompt"
    """A prompt did not fit in the model's context."""
    ENGINE_ERROR = "engine_error"
    """The engine failed to answer a call."""
    TOO_MANY_CALLS = "too_many_calls"
    """The agent asked for more model calls than a rollout may make."""
    BAD_REWARD = "bad_reward"
    """The reward is None, not a number, not finite, or outside the declared range."""
    WORKER_LOST = "worker_lost"
    """The worker that ran it died, or was not heard of any more."""
    CANCELLED = "cancelled"
    """The run stopped, or the rollout's group was given up."""


class ToolStatus(StrEnum):
    """How a tool call went."""

    OK = "ok"
    ERROR = "error"
    """The tool said that it failed."""
    INVALID_ARGUMENTS = "invalid_arguments"
    """The arguments are not a JSON object, or the tool would not have them."""
    TIMEOUT = "timeout"
    EMPTY = "empty"
    """The tool returned nothing."""
    UNANSWERED = "unanswered"
    """No later request had a result: the agent stopped, or did not run the tool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A row of data."""

    task_id: str
    payload: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class RolloutKey:
    """One attempt at one rollout.

    Example:

        key = RolloutKey(split="train", group=12, index=3, attempt=0)
        key.group_id    # "train-12"
        key.rollout_id  # "train-12-3"
    """

    split: Split
    group: int
    """Number of the group in its split, counted from 0 in the order of admission."""
    index: int
    """Which of the group's rollouts, from 0."""
    attempt: int = 0

    @property
    def group_id(self) -> str:
        return f"{self.split}-{self.group}"

    @property
    def rollout_id(self) -> str:
        return f"{self.split}-{self.group}-{self.index}"

    @classmethod
    def parse(cls, rollout_id: str, attempt: int) -> RolloutKey:
        """Read a key back from the two parts of a URL. Raises ValueError."""
        split, group, index = rollout_id.split("-")
        if split not in ("train", "val"):
            raise ValueError(f"unknown split {split!r} in rollout id {rollout_id!r}")
        return cls(split="train" if split == "train" else "val", group=int(group), index=int(index), attempt=attempt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The versioned thing an agent may depend on: an endpoint, a model name, and how it samples."""

    version: int
    base_url: str
    """OpenAI base URL of this rollout, ending in /v1: it carries rollout, attempt, secret and agent name."""
    model: str
    api_key: str = "agent-lightning"
    """Any string: the secret is in the URL."""
    sampling: Mapping[str, float | int] = field(default_factory=dict)
    """What the gateway asks of the engine, e.g. {"temperature": 1.0, "max_tokens": 64}."""

    @property
    def anthropic_base_url(self) -> str:
        """The same endpoint for Anthropic's client libraries, which add /v1 themselves."""
        return self.base_url.removesuffix("/v1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCall:
    """A span: one call of the policy, with exactly what the engine read and sampled."""

    key: RolloutKey
    call_id: str
    """Unique in the run; the id of the reply that the agent saw."""
    agent: str
    """Name of the agent that called: from the header, the URL, or the agent span above."""
    policy_version: int
    """When it began: no token is of an older one."""
    prompt_T: Ints
    response_T: Ints
    """Sampled tokens, the end-of-turn token included where it was sampled."""
    logprob_T: Floats
    """Of each token of `response_T`, as the engine sampled it; natural logarithm. NaN where it is not known."""
    finish_reason: str
    """stop, length, tool_calls, …: the engine's word."""
    started_at: float
    """Unix seconds."""
    ended_at: float
    request: str = ""
    """JSON text of the messages that the agent sent."""
    reply: str = ""
    """JSON text of the message that the agent got."""
    span_id: str = ""
    """Its own id in a trace, where one shows it."""
    parent_id: str = ""
    """Of the span above, "" where none is known."""
    model: str = ""
    """Its name in a trace; "" is the policy's."""
    error: str = ""
    """Why there is no reply, in a trace; "" where there is one."""
    source: Source = "gateway"
    """From a trace it is another model's call, or one of another run: it has no tokens and is never trained."""
    last_version: int | None = None
    """When it ended, where serving.in_flight=keep let an update come between: no token is of a newer one. None: it has
    one version. Each log-probability is that of the version which sampled the token."""

    def __post_init__(self) -> None:
        if self.response_T.shape != self.logprob_T.shape:
            raise ValueError(
                f"call {self.call_id}: {self.response_T.size} tokens but {self.logprob_T.size} log-probabilities"
            )
        if (np.isinf(self.logprob_T) | (self.logprob_T > 0)).any():
            raise ValueError(f"call {self.call_id}: a log-probability must be at most 0 and finite, or NaN for unknown")
        _freeze(self.prompt_T, self.response_T, self.logprob_T)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A span: one use of a tool, and what became of it."""

    key: RolloutKey
    span_id: str
    """Unique in the attempt."""
    parent_id: str = ""
    """Of the span above: the agent, or the model call that asked for it."""
    call_id: str = ""
    """Of the ModelCall that caused it: whose reply asked for it, or else the last one before it; "" where none was."""
    tool_call_id: str = ""
    """The id in that reply, "" where it has none."""
    name: str
    arguments: str
    """As the model wrote them: JSON text, if all is well."""
    result: str = ""
    """What the tool returned, as text; its error where it failed."""
    status: ToolStatus
    started_at: float
    """Unix seconds; read from requests: when the reply that asked for it was there."""
    ended_at: float
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A span: a number that the agent's side gave to something that happened."""

    key: RolloutKey
    span_id: str
    name: str = "reward"
    """The dimension, e.g. "format"."""
    value: float
    about: str = ""
    """The `call_id` of a ModelCall or the `span_id` of a ToolCall; "" is the whole rollout."""
    at: float
    """Unix seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSpan:
    """A span: an agent at work; its model calls, tools and sub-agents have it as parent."""

    key: RolloutKey
    span_id: str
    parent_id: str = ""
    name: str
    started_at: float
    ended_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """The ordered spans of one finished attempt, its reward and its outcome."""

    key: RolloutKey
    task_id: str
    calls: tuple[ModelCall, ...]
    reward: float | None
    """None where the outcome gives no reward."""
    outcome: Outcome
    error: str = ""
    """One line: what went wrong; empty for FINISHED."""
    output: str = ""
    """What the agent returned, as text cut to a sensible length."""
    started_at: float = 0.0
    ended_at: float = 0.0
    tools: tuple[ToolCall, ...] = ()
    rewards: tuple[Reward, ...] = ()
    """Those that the agent's side emitted; `reward` is the rollout's own."""
    agents: tuple[AgentSpan, ...] = ()
    """Where a trace showed them."""
    refused_spans: Mapping[str, int] = field(default_factory=dict)
    """Reason -> spans of its trace that are not among these, or that were repaired."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All rollouts of one task, in the order of their index."""

    group_id: str
    task: Task
    trajectories: tuple[Trajectory, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One flat training row: a chain of calls whose prompts extend each other.

    Example: prompt [5 6], response [7 8], next prompt [5 6 7 8 9], response [4] become

        token_T      5  6  7  8  9  4
        mask_T       0  0  1  1  0  1
    """

    key: RolloutKey
    policy_version: int
    """The oldest version among the calls of the chain."""
    token_T: Ints
    mask_T: Bools
    """True where the policy sampled the token and it is trained."""
    logprob_T: Floats
    """The engine's log-probability where `mask_T`, else 0; NaN where the engine gave none."""
    advantage_T: Floats
    """Where `mask_T`, else 0. All 0 where the learner's critic is to say."""
    reward_T: Floats
    """What the rollout earned: a call's share at the last token that it sampled, else 0."""
    call_T: Ints
    """Which of the rollout's trained calls sampled the token, in their order; 0 where none did."""

    def __post_init__(self) -> None:
        arrays = (self.token_T, self.mask_T, self.logprob_T, self.advantage_T, self.reward_T, self.call_T)
        shapes = {array.shape for array in arrays}
        if len(shapes) != 1:
            raise ValueError(f"sample of {self.key.rollout_id}: arrays of different shapes {sorted(shapes)}")
        _freeze(*arrays)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Right-padded samples of one optimiser step. Rows of one rollout are never split between batches."""

    token_NT: Ints
    mask_NT: Bools
    logprob_NT: Floats
    advantage_NT: Floats
    reward_NT: Floats
    call_NT: Ints
    weight_NT: Floats
    """How much each trained token counts in the loss; sums to 1 over the batch: each rollout weighs the same
    (1 / rollouts), spread evenly over its trained tokens. All-zero rows are padding."""
    length_N: Ints
    """Tokens of each row before padding."""
    rollout_N: Ints
    """Which of the batch's rollouts each row is of; -1 for a padding row."""
    num_rollouts: int

    def __post_init__(self) -> None:
        _freeze(self.token_NT, self.mask_NT, self.logprob_NT, self.advantage_NT, self.reward_NT, self.call_NT)
        _freeze(self.weight_NT, self.length_N, self.rollout_N)


def _freeze(*arrays: NDArray[Any]) -> None:
    for array in arrays:
        array.flags.writeable = False
