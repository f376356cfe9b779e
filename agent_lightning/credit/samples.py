"""From calls to samples: trained calls are selected, joined to chains whose prompts extend each other, and flattened.

Every sampled token of the calls given to `to_samples` either has `mask_T` True in exactly one row, or is counted in
exactly one `Dropped`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agent_lightning.core.errors import ConfigError
from agent_lightning.core.types import Floats, Ints, ModelCall, Sample, Trajectory
from agent_lightning.credit.estimators import carry_back

OVERLONG_SAMPLE: Final = "overlong_sample"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """Sampled tokens that are not trained, and the reason."""

    reason: str
    tokens: int
    calls: tuple[str, ...] = ()
    """Ids of the calls that sampled them."""


def select_calls(calls: Sequence[ModelCall], pattern: str) -> tuple[int, ...]:
    """Indices of the calls of trained agents; `pattern` is a comma-separated list of case-sensitive globs.

    Calls of other models, which come from a trace, are context: no pattern selects them.

    Example, with calls of agents writer, judge, rewriter-2: "*" selects 0, 1, 2; "writer, rewriter*" selects 0, 2.

    Raises ConfigError if the list is empty or has an empty entry.
    """
    globs = [part.strip() for part in pattern.split(",")]
    if not all(globs):
        raise ConfigError(f"agents: {pattern!r} has an empty agent name; write e.g. '*' or 'writer,rewriter*'")
    agents = [(i, call.agent) for i, call in enumerate(calls) if call.source == "gateway"]
    return tuple(i for i, agent in agents if any(fnmatchcase(agent, glob) for glob in globs))


def chain_calls(calls: Sequence[ModelCall]) -> tuple[tuple[ModelCall, ...], ...]:
    """Group calls into conversations: a call joins the longest conversation that its prompt extends.

    `calls` are in the order they were made. The history of a conversation is the prompt and response of its last call;
    a prompt extends a conversation if it starts with all of its history. A call that extends no conversation starts a
    new one. Between equal histories the earlier conversation is taken. Conversations are in the order of their first
    calls.

    Example, two agents taking turns:

        call  prompt         response  extends
        a1    1 5            6
        b1    1 7            8
        a2    1 5 6 9        3         a1
        b2    1 7 8 2        4         b1

        chain_calls([a1, b1, a2, b2])  # ((a1, a2), (b1, b2))
    """
    return tuple(tuple(calls[i] for i in members) for members in _chain_indices(calls))


def to_samples(
    trajectory: Trajectory,
    trained: Sequence[ModelCall],
    advantage: Floats,
    reward: NDArray[np.floating],
    *,
    max_tokens: int,
) -> tuple[tuple[Sample, ...], tuple[Dropped, ...]]:
    """One flat row for each chain of the `trained` calls; `advantage` and `reward` have shape [len(trained)].

    Example, calls a1 and a2 of `chain_calls` with advantages 0.5 and -1, rewards 0 and 2; a2 is the third trained call:

        token_T       1    5    6    9    3
        mask_T        0    0    1    0    1
        advantage_T   0    0  0.5    0   -1
        reward_T      0    0    0    0    2
        call_T        0    0    0    0    2

    A row of more than `max_tokens` tokens is not cut but dropped, and returned as Dropped("overlong_sample", …): the
    policy never saw a conversation end at the cut. A chain that sampled no token makes no row. The reward of a call
    that is in no row goes to the call before it (`estimators.carry_back`).

    Raises ValueError if `advantage` or `reward` has another shape.
    """
    if not advantage.shape == reward.shape == (len(trained),):
        raise ValueError(f"{len(trained)} trained calls but advantages of shape {advantage.shape}")
    rows: list[list[int]] = []
    dropped: list[Dropped] = []
    for members in _chain_indices(trained):
        chain = [trained[i] for i in members]
        num_sampled = sum(call.response_T.size for call in chain)
        if num_sampled == 0:
            continue
        if chain[-1].prompt_T.size + chain[-1].response_T.size > max_tokens:
            ids = tuple(call.call_id for call in chain)
            dropped.append(Dropped(reason=OVERLONG_SAMPLE, tokens=num_sampled, calls=ids))
        else:
            rows.append(members)
    kept = sorted(i for members in rows for i in members if trained[i].response_T.size)
    earned = np.zeros(len(trained), np.float32)
    earned[kept] = carry_back(reward, kept)
    return tuple(_flatten(trajectory, trained, members, advantage, earned) for members in rows), tuple(dropped)


def by_call(
    rows: Iterable[tuple[Sample, Floats]], rollouts: Iterable[Trajectory], pattern: str
) -> dict[tuple[str, str], Floats]:
    """The values of samples at the tokens that each call sampled, by the ids of rollout and call. `rows` has a value
    for each token of a sample; `rollouts` are those of the samples, and `pattern` that of `select_calls`.

    Example: the row of `to_samples` with values 1 2 3 4 5 -> {("train-0-0", "a1"): [3], ("train-0-0", "a2"): [5]}
    """
    all_calls = {rollout.key.rollout_id: rollout.calls for rollout in rollouts}
    values: dict[tuple[str, str], Floats] = {}
    for sample, value_T in rows:
        rollout_id = sample.key.rollout_id
        calls = all_calls[rollout_id]
        trained = select_calls(calls, pattern)
        for index in np.unique(sample.call_T[sample.mask_T]):
            call_id = calls[trained[index]].call_id
            values[rollout_id, call_id] = value_T[sample.mask_T & (sample.call_T == index)]
    return values


@dataclass(slots=True)
class _Conversation:
    history_T: Ints
    members: list[int]
    """Indices of the conversation's calls, in order."""


def _chain_indices(calls: Sequence[ModelCall]) -> list[list[int]]:
    conversations: list[_Conversation] = []
    for index, call in enumerate(calls):
        history_T = np.concatenate([call.prompt_T, call.response_T])
        longest: _Conversation | None = None
        for candidate in conversations:
            size = candidate.history_T.size
            # A candidate that is not longer than the best so far cannot win: its tokens need not be compared.
            if size > call.prompt_T.size or (longest is not None and size <= longest.history_T.size):
                continue
            # Conversations share their system prompt and differ late: the last token rejects most of them at once.
            if size and call.prompt_T[size - 1] != candidate.history_T[-1]:
                continue
            if np.array_equal(call.prompt_T[:size], candidate.history_T):
                longest = candidate
        if longest is None:
            conversations.append(_Conversation(history_T, [index]))
        else:
            longest.history_T = history_T
            longest.members.append(index)
    return [conversation.members for conversation in conversations]


def _flatten(
    trajectory: Trajectory, trained: Sequence[ModelCall], members: Sequence[int], advantage: Floats, reward: Floats
) -> Sample:
    """The row of a chain: the last call's prompt and response, which contain those of all earlier calls."""
    chain = [trained[i] for i in members]
    token_T = np.concatenate([chain[-1].prompt_T, chain[-1].response_T]).astype(np.int32)
    mask_T = np.zeros(token_T.shape, np.bool_)
    logprob_T, advantage_T, reward_T = (np.zeros(token_T.shape, np.float32) for _ in range(3))
    call_T, version_T = np.zeros(token_T.shape, np.int32), np.zeros(token_T.shape, np.int32)
    for index, call in zip(members, chain, strict=True):
        response = slice(call.prompt_T.size, call.prompt_T.size + call.response_T.size)
        mask_T[response] = True
        logprob_T[response] = call.logprob_T
        advantage_T[response] = advantage[index]
        reward_T[response][-1:] = reward[index]
        call_T[response] = index
        version_T[response] = call.version_T
    return Sample(
        key=trajectory.key,
        token_T=token_T,
        mask_T=mask_T,
        logprob_T=logprob_T,
        advantage_T=advantage_T,
        reward_T=reward_T,
        call_T=call_T,
        version_T=version_T,
    )
