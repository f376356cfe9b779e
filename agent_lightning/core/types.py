"""The nouns of the system: frozen dataclasses over read-only NumPy arrays.

A task is run as a group of rollouts, each of one attempt or more (`RolloutKey`), which leaves spans (`ModelCall`,
`ToolCall`, `Reward`, `AgentSpan`). Spans become a `Trajectory`, trajectories `Sample`s, and samples a `Batch`.

Names end in the shape of their array: `_T` tokens of one sequence, `_N` rows of a batch, `_G` groups, `_R` rollouts of
a group. `token_NT` has shape [N, T]. Times (`at`, `started_at`, `ended_at`) are Unix seconds.

Arrays are read-only from construction on, as Ray returns them: a test on a laptop then fails as a cluster would.
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
OnWeightUpdate = Literal["wait", "keep", "restart"]
"""What happens to a call that is running when the policy's weights are updated; see serving/gate.py."""
Split = Literal["train", "val"]
Source = Literal["gateway", "trace", "request"]
"""Where a span was seen: at the gateway, in a trace (OpenTelemetry), or in the tool messages of a later request."""

DEFAULT_AGENT = "agent"
"""The agent's name in a rollout's URL, unless the config or the agent chooses another."""

POLICY = "policy"
"""The policy's name: the model that an agent requests."""


class Outcome(StrEnum):
    """How a rollout ended. Every admitted rollout gets exactly one outcome."""

    FINISHED = "finished"
    """The agent returned and its reward is a number in the declared range."""
    AGENT_ERROR = "agent_error"
    """The agent raised, or its process exited with an error."""
    TOOL_ERROR = "tool_error"
    """Like AGENT_ERROR, but the error matches `agent.tool_errors`: a tool or service failed, not the agent."""
    TIMEOUT = "timeout"
    """The deadline of the rollout passed."""
    NO_MODEL_CALL = "no_model_call"
    """The agent returned, but no call of the policy was recorded."""
    OVERLONG_PROMPT = "overlong_prompt"
    """A prompt did not fit in the model's context."""
    ENGINE_ERROR = "engine_error"
    """The engine failed to answer a call."""
    TOO_MANY_CALLS = "too_many_calls"
    """The agent made more model calls than a rollout may make."""
    BAD_REWARD = "bad_reward"
    """The agent gives its own reward, and that is no finite number, or none."""
    SCORER_ERROR = "scorer_error"
    """The reward function raised, took too long, or returned no reward: its fault, not that of the rollout."""
    UNSCORED = "unscored"
    """The agent returned, and the reward function has no opinion: it returned None."""
    WORKER_LOST = "worker_lost"
    """The worker that ran the rollout died, or its lease expired."""
    CANCELLED = "cancelled"
    """The run stopped, or the rollout's group was abandoned."""


class ToolStatus(StrEnum):
    """How a tool call ended."""

    OK = "ok"
    ERROR = "error"
    """The result is an error message."""
    INVALID_ARGUMENTS = "invalid_arguments"
    """The arguments are not a JSON object, or the tool rejected them."""
    TIMEOUT = "timeout"
    """The result reports that the tool ran out of time."""
    EMPTY = "empty"
    """The tool returned nothing."""
    UNANSWERED = "unanswered"
    """No later request contains a result: the agent stopped, or did not run the tool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A row of the data set: what an agent has to solve."""

    task_id: str
    """The row's id, unique in its data set."""
    payload: Mapping[str, Any]
    """The row's columns, as the agent and the reward function receive them."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class RolloutKey:
    """The name of one attempt at one rollout.

    key = RolloutKey(split="train", group=12, index=3, attempt=0)
    key.group_id    # "train-12"
    key.rollout_id  # "train-12-3"
    """

    split: Split
    group: int
    """The group's number in its split, counted from 0 in the order of admission."""
    index: int
    """The rollout's number in its group, from 0."""
    attempt: int = 0
    """The attempt's number, from 0: a rollout that failed may be tried again."""

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
    """The model that is trained, as an agent sees it: an endpoint, a model name, and sampling parameters."""

    version: int
    """How often the weights have been updated."""
    base_url: str
    """OpenAI base URL of this attempt, ending in /v1: it contains rollout, attempt, secret and agent name."""
    model: str
    """The model name that requests must contain."""
    api_key: str = "agent-lightning"
    """Any string: the secret is in the URL."""
    sampling: Mapping[str, float | int] = field(default_factory=dict)
    """Sampling parameters that the gateway sends to the engine, e.g. {"temperature": 1.0, "max_tokens": 64}."""

    @property
    def anthropic_base_url(self) -> str:
        """The same endpoint for the client libraries of Anthropic and Google, which add /v1 and /v1beta themselves."""
        return self.base_url.removesuffix("/v1")

    def environment(self) -> dict[str, str]:
        """The variables in which OpenAI's, Anthropic's and Google's client libraries look for a URL and a key."""
        return {
            "OPENAI_BASE_URL": self.base_url,
            "OPENAI_API_KEY": self.api_key,
            "ANTHROPIC_BASE_URL": self.anthropic_base_url,
            "ANTHROPIC_API_KEY": self.api_key,
            "GOOGLE_GEMINI_BASE_URL": self.anthropic_base_url,
            "GEMINI_API_KEY": self.api_key,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCall:
    """A span: one call of the policy, with exactly the tokens that the engine read and sampled."""

    key: RolloutKey
    call_id: str
    """The id of the reply that the agent received; unique in the run."""
    agent: str
    """Name of the agent that made the call: from the header, the URL, or the agent span above."""
    policy_version: int
    """Version of the weights when the call began: no token was sampled by an older version."""
    prompt_T: Ints
    """Token ids that the engine read."""
    response_T: Ints
    """Token ids that the engine sampled, including the end-of-turn token if it was sampled."""
    logprob_T: Floats
    """Natural log-probability of each token of `response_T` under the version that sampled it; NaN if unknown."""
    finish_reason: str
    """Why the reply ended, in the engine's words: stop, length, tool_calls, …"""
    started_at: float
    ended_at: float
    request: str = ""
    """JSON text of the messages that the agent sent."""
    reply: str = ""
    """JSON text of the message that the agent received."""
    span_id: str = ""
    """The call's own id in a trace; "" if no trace shows the call."""
    parent_id: str = ""
    """Id of the span above; "" if none is known."""
    model: str = ""
    """The model's name in a trace; "" for the policy."""
    error: str = ""
    """Why a trace shows no reply; "" if there is a reply."""
    source: Source = "gateway"
    """A call with source "trace" was made to another model, or in another run. It is never trained."""
    last_version: int | None = None
    """Version that sampled the last token, if it is newer than `policy_version`; else None."""
    offered: tuple[str, ...] = ()
    """JSON text of the definition, in OpenAI's form, of each tool that the request offered."""
    new_versions: tuple[tuple[int, int], ...] = ()
    """(index in `response_T`, version) of the first token of each version that came while the call ran, ascending."""

    @property
    def version_T(self) -> Ints:
        """Version that sampled each token; `policy_version` in calls recorded before there were `new_versions`."""
        version_T = np.full(self.response_T.shape, self.policy_version, np.int32)
        for first, version in self.new_versions:
            version_T[first:] = version
        return version_T

    def __post_init__(self) -> None:
        if self.response_T.shape != self.logprob_T.shape:
            sizes = f"{self.response_T.size} tokens but {self.logprob_T.size} log-probabilities"
            raise ValueError(f"call {self.call_id}: {sizes}")
        if (np.isinf(self.logprob_T) | (self.logprob_T > 0)).any():
            raise ValueError(f"call {self.call_id}: a log-probability must be at most 0 and finite, or NaN for unknown")
        _freeze(self.prompt_T, self.response_T, self.logprob_T)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A span: one use of a tool, and its result."""

    key: RolloutKey
    span_id: str
    parent_id: str = ""
    """Id of the span above: the agent, or the model call that requested the tool."""
    call_id: str = ""
    """Id of the ModelCall whose reply requested the tool, or else of the last call before it; "" if there was none."""
    tool_call_id: str = ""
    """The tool call's id in that reply; "" if it has none."""
    name: str
    arguments: str
    """The arguments as the model wrote them: normally JSON text."""
    result: str = ""
    """What the tool returned, as text; its error message if it failed."""
    status: ToolStatus
    started_at: float
    """With source "request": when the reply that requested the tool was complete."""
    ended_at: float
    """With source "request": when the request with the result was sent."""
    source: Source


LARGEST_REWARD = 1e15
"""Largest size of a reward. float32 ends at 3.4e38: the square of a sum of 10,000 such rewards is still finite."""


def is_reward(value: float) -> bool:
    """Whether a number can be a reward: it is finite, and what a step computes from it is finite in float32."""
    return abs(value) <= LARGEST_REWARD  # False for NaN


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A span: a number with which the agent's process rated the rollout or an event in it (`emit_reward`)."""

    key: RolloutKey
    span_id: str
    name: str = "reward"
    """The dimension, e.g. "format"."""
    value: float
    about: str = ""
    """The `call_id` of a ModelCall or the `span_id` of a ToolCall; "" for the rollout itself."""
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSpan:
    """A span: the time in which an agent worked; its model calls, tools and sub-agents have this span as parent."""

    key: RolloutKey
    span_id: str
    parent_id: str = ""
    """Id of the span above; "" if none is known."""
    name: str
    started_at: float
    ended_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How an attempt ended, or what the gateway reports to have gone wrong in it."""

    outcome: Outcome
    error: str = ""
    """What went wrong, as one line; "" for FINISHED."""
    reward: float | None = None
    """The final reward; None if the outcome gives none."""
    output: str = ""
    """What the agent returned, as text cut to 2,000 characters."""
    at: float = 0.0
    """When the buffer recorded the ending; 0 before that."""
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    """The named parts of the reward, before their weights, if the reward has parts."""
    trace: str = ""
    """Where the user's code failed: its file and line, and the last frames."""
    printed: str = ""
    """The last 4 KiB that the code of the attempt printed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """The spans of one finished attempt in the order of time, and its ending (see `Ending` for the fields of both)."""

    key: RolloutKey
    task_id: str
    calls: tuple[ModelCall, ...]
    reward: float | None
    outcome: Outcome
    error: str = ""
    output: str = ""
    started_at: float = 0.0
    ended_at: float = 0.0
    tools: tuple[ToolCall, ...] = ()
    rewards: tuple[Reward, ...] = ()
    """Rewards that the agent's process emitted; the final reward is `reward`."""
    agents: tuple[AgentSpan, ...] = ()
    """Agents, if a trace shows them."""
    refused_spans: Mapping[str, int] = field(default_factory=dict)
    """Reason -> number of the trace's spans that were left out, or repaired, for this reason."""
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    trace: str = ""
    printed: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All rollouts of one task."""

    group_id: str
    task: Task
    trajectories: tuple[Trajectory, ...]
    """The last attempt of each rollout, in the order of `RolloutKey.index`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One flat training row: a chain of calls, each of whose prompts begins with the tokens before it.

    Example: prompt [5 6], response [7 8], next prompt [5 6 7 8 9], response [4] become

        token_T      5  6  7  8  9  4
        mask_T       0  0  1  1  0  1
    """

    key: RolloutKey
    token_T: Ints
    """The last call's prompt and response, which contain all earlier ones."""
    mask_T: Bools
    """True where the policy sampled the token and it is trained."""
    logprob_T: Floats
    """The engine's log-probability where `mask_T`, else 0; NaN for a token for which the engine gave none."""
    advantage_T: Floats
    """The advantage where `mask_T`, else 0. All 0 if the learner's critic computes it later."""
    reward_T: Floats
    """The reward of each call, at the last token that the call sampled; else 0."""
    call_T: Ints
    """Index, among the rollout's trained calls, of the call that sampled the token; 0 for tokens not sampled."""
    version_T: Ints
    """Version of the policy that sampled the token; 0 for tokens not sampled."""

    def __post_init__(self) -> None:
        floats = (self.logprob_T, self.advantage_T, self.reward_T)
        arrays = (self.token_T, self.mask_T, *floats, self.call_T, self.version_T)
        shapes = {array.shape for array in arrays}
        if len(shapes) != 1:
            raise ValueError(f"sample of {self.key.rollout_id}: arrays of different shapes {sorted(shapes)}")
        _freeze(*arrays)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Right-padded samples of one optimiser step: row n of an `_NT` array is a sample's. A rollout is never split."""

    token_NT: Ints
    mask_NT: Bools
    logprob_NT: Floats
    advantage_NT: Floats
    reward_NT: Floats
    call_NT: Ints
    version_NT: Ints
    weight_NT: Floats
    """Weight of each trained token in the loss. The weights of a batch sum to 1: each rollout has 1 / num_rollouts,
    spread evenly over its trained tokens. All-zero rows are padding."""
    length_N: Ints
    """Number of tokens of each row before padding."""
    rollout_N: Ints
    """Index, among the batch's rollouts, of the rollout that each row comes from; -1 for a padding row."""
    num_rollouts: int

    def __post_init__(self) -> None:
        _freeze(self.token_NT, self.mask_NT, self.logprob_NT, self.advantage_NT, self.reward_NT, self.call_NT)
        _freeze(self.weight_NT, self.length_N, self.rollout_N, self.version_NT)


def _freeze(*arrays: NDArray[Any]) -> None:
    for array in arrays:
        array.flags.writeable = False
