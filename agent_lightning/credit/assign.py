"""LightningRL: the rewards of a group become advantages of its calls, and its calls become samples to train on.

Statistics are taken over rollouts and before anything is dropped, so a rollout counts once whatever its number of
calls or rows.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agent_lightning.config.learning import AirConfig, CreditConfig, FailuresConfig
from agent_lightning.core.metrics import Mean, Metrics
from agent_lightning.core.types import LARGEST_REWARD, Floats, Group, ModelCall, Outcome, Sample, Trajectory
from agent_lightning.credit import estimators, states
from agent_lightning.credit.air import Air, ObservedEvent, bounded, observed_events
from agent_lightning.credit.failures import learned_reward, mask_reason
from agent_lightning.credit.samples import OVERLONG_SAMPLE, select_calls, to_samples
from agent_lightning.credit.states import StateKey

NO_SPREAD: Final = "no_spread"
NO_SELECTED_CALL: Final = "no_selected_call"
STALE: Final = "stale"


@dataclass(frozen=True, slots=True, kw_only=True)
class CreditRules:
    """All settings that `assign` needs."""

    credit: CreditConfig = CreditConfig()
    failures: FailuresConfig = FailuresConfig()
    air: Air | None = None
    agents: str = "*"
    """Names of the trained agents; a pattern of `samples.select_calls`."""
    reward_range: float = 1.0
    """Highest minus lowest final reward; AIR's rewards are scaled by it."""
    bound: float = AirConfig().bound
    """Most that AIR and rewards that the agent emits may add up to in a rollout, as a share of `reward_range`."""
    state_key: StateKey | None = None
    """A user's function for credit.state_key; None: the function that it names."""
    max_tokens: int = 2**31
    """Longest row that is trained; a longer one is dropped."""
    drop_beyond: int | None = None
    """Updates by which a token may be older than the version that is trained, or its group is dropped; None: any."""

    def at(self, step: int) -> CreditRules:
        """The rules of a step; the run's first is 1."""
        if self.credit.pass_at_steps is None or step <= self.credit.pass_at_steps:
            return self
        return replace(self, credit=self.credit.model_copy(update={"pass_at": 1}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """The samples of a group, and an account of everything that is not trained. rollouts of the group =
    trained_rollouts + sum(dropped_rollouts), and sampled_tokens = tokens with mask True in `samples` +
    sum(dropped_tokens). Rollouts and tokens are dropped for one of these reasons:

    masked_<outcome>   the outcome has no reward (algorithm.failures); masked_truncated: finished, but a reply was cut
    no_selected_call   no call of a trained agent sampled a token
    no_spread          every advantage of the group is zero, and so is its policy gradient. This reason is not used if
                       the advantage depends on the other groups of the step, or on a critic
    overlong_sample    the row is longer than `max_tokens`; the rollout is dropped if all of its rows are
    stale              a token that would be trained in the group is more than `drop_beyond` updates old
    """

    samples: tuple[Sample, ...]
    trained_rollouts: int
    """Rollouts with at least one sample."""
    dropped_rollouts: Mapping[str, int]
    """Reason -> number of rollouts."""
    dropped_tokens: Mapping[str, int]
    """Reason -> number of tokens that selected calls sampled."""
    sampled_tokens: int
    """Number of tokens that the selected calls of the group sampled."""
    reward_R: Floats
    """Final rewards, in the order of the group's trajectories; NaN for masked rollouts."""
    metrics: Metrics


def assign(group: Group, rules: CreditRules, version: int = 0) -> Credit:
    """The samples of a group, with an advantage on every trained token, and an account of what is not trained.
    `version` is the version that the step trains; only `rules.drop_beyond` reads it.

    With scale="batch" and method="gae" the learner computes the final advantages from those of all groups of the step.

    Example, one call a rollout, scale="none":

        rollout  outcome       reward   advantage
        0        finished        1         0.5      one sample
        1        finished        0        -0.5      one sample
        2        engine_error    -          -       dropped_rollouts = {"masked_engine_error": 1}

    Raises ConfigError if the pattern of trained agents has an empty name.
    """
    accounting = _Accounting.of(group, rules, version)
    rollouts, shares = accounting.rollouts, accounting.shares
    samples = tuple(sample for share in shares for sample in share.samples)
    calls = [call for rollout in rollouts for call in rollout.calls]
    metrics = {
        "reward": Mean.of(rollout.reward for rollout in rollouts if rollout.reward is not None),
        "group/no_spread": Mean.of([not accounting.spread]),
        "rollout/finished": Mean.of(rollout.trajectory.outcome is Outcome.FINISHED for rollout in rollouts),
        "rollout/calls": Mean.of(len(rollout.selected) for rollout in rollouts),
        "rollout/response_tokens": Mean.of(rollout.num_sampled for rollout in rollouts),
        "call/prompt_tokens": Mean.of(call.prompt_T.size for call in calls),
        "call/response_tokens": Mean.of(call.response_T.size for call in calls),
        "sample/tokens": Mean.of(sample.token_T.size for sample in samples),
    }
    by_name: defaultdict[str, list[float]] = defaultdict(list)
    for reward in (reward for rollout in rollouts for reward in rollout.trajectory.rewards):
        by_name[reward.name].append(reward.value)
    metrics |= {f"emitted/{name}": Mean.of(by_name[name]) for name in sorted(by_name)}
    if by_name and rules.credit.emitted == "bounded":
        metrics["credit/emitted_cut"] = Mean.of(rollout.cut for rollout in rollouts)
    if accounting.shared is not None:
        metrics["credit/shared_states"] = Mean.of(accounting.shared)
    parts: defaultdict[str, list[float]] = defaultdict(list)
    for name, value in (part for rollout in rollouts for part in rollout.trajectory.reward_parts.items()):
        parts[name].append(value)
    metrics |= {f"reward_part/{name}": Mean.of(parts[name]) for name in sorted(parts)}
    if rules.air is not None:
        metrics["air/reward"] = Mean.of(float(rollout.intermediate_T.sum()) for rollout in rollouts)
    return Credit(
        samples=samples,
        trained_rollouts=sum(share.reason is None for share in shares),
        dropped_rollouts=dict(Counter(share.reason for share in shares if share.reason is not None)),
        dropped_tokens=dict(sum((Counter(share.dropped_tokens) for share in shares), Counter[str]())),
        sampled_tokens=sum(rollout.num_sampled for rollout in rollouts),
        reward_R=np.array([rollout.final for rollout in rollouts], np.float32),
        metrics=metrics,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CallCredit:
    """The credit of one call, and whether its tokens are trained."""

    call_id: str
    intermediate: float
    """Intermediate reward: from AIR, and from rewards that the agent's process emitted."""
    return_to_go: float
    """Rewards of this call and all later ones, discounted; NaN if the rollout is masked."""
    advantage: float
    """0 if the call is not trained; NaN if a critic computes the advantage of each token."""
    tokens: int
    """Number of sampled tokens."""
    status: str
    """"trained", "not selected", or the reason why the call was dropped."""
    events: tuple[tuple[ObservedEvent, float], ...] = ()
    """What the call caused, and what AIR paid for it."""
    learner_logprobs: tuple[float, ...] = ()
    """Log-probability of each sampled token under the policy that was trained, before the update; empty if they were
    not computed. Where that policy is the one that sampled, they differ from the engine's by the gap."""


def explain_credit(group: Group, rules: CreditRules, version: int = 0) -> tuple[tuple[CallCredit, ...], ...]:
    """The credit that `assign` gives to each call of each rollout of the group."""
    accounting = _Accounting.of(group, rules, version)
    return tuple(_explain(accounting, index, rules) for index in range(len(accounting.rollouts)))


def _explain(accounting: _Accounting, index: int, rules: CreditRules) -> tuple[CallCredit, ...]:
    rollout, share = accounting.rollouts[index], accounting.shares[index]
    advantages = dict(zip(rollout.selected, accounting.advantages[index].tolist(), strict=True))
    trajectory, credits = rollout.trajectory, []
    unpaid = [(event, 0.0) for event in observed_events(trajectory)]
    events = unpaid if rules.air is None else rules.air.worth(trajectory)
    for t, call in enumerate(trajectory.calls):
        status = share.reason or share.dropped_calls.get(call.call_id, "trained") if t in advantages else "not selected"
        advantage = advantages[t] if status == "trained" else 0.0
        credits.append(
            CallCredit(
                call_id=call.call_id,
                intermediate=float(rollout.intermediate_T[t]),
                return_to_go=float(rollout.return_T[t]),
                advantage=math.nan if status == "trained" and rules.credit.method == "gae" else advantage,
                tokens=call.response_T.size,
                status=status,
                events=tuple((event, value) for event, value in events if event.call == t),
            )
        )
    return tuple(credits)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Accounting:
    """All intermediate results for a group, in the order of its trajectories."""

    rollouts: Sequence[_Rollout]
    advantages: Sequence[Floats]
    """Advantages of the selected calls of each rollout."""
    spread: bool
    """Whether the group's own rewards tell its rollouts apart."""
    shares: Sequence[_Share]
    shared: Sequence[bool] | None
    """Whether the state of each selected call occurs in another rollout; None unless the method compares states."""

    @classmethod
    def of(cls, group: Group, rules: CreditRules, version: int) -> _Accounting:
        rollouts = [_Rollout.of(trajectory, rules) for trajectory in group.trajectories]
        advantages, shared = _advantages(rollouts, rules.credit), None
        if rules.credit.method == "same_state":
            shared = states.shared([rollout.states for rollout in rollouts if rollout.reward is not None])
        if rules.credit.is_per_group:
            spread = any(advantage.any() for advantage in advantages)
        else:
            spread = estimators.has_spread(np.array([r.total for r in rollouts if r.reward is not None], np.float64))
        is_useful = spread or not rules.credit.is_per_group
        pairs = zip(rollouts, advantages, strict=True)
        shares = [_Share.of(rollout, advantage, is_useful=is_useful, rules=rules) for rollout, advantage in pairs]
        if rules.drop_beyond is not None:
            samples = [sample for share in shares for sample in share.samples]
            oldest = min((sample.version_T[sample.mask_T].min(initial=version) for sample in samples), default=version)
            if version - oldest > rules.drop_beyond:
                shares = [share.stale() for share in shares]
        return cls(rollouts=rollouts, advantages=advantages, spread=spread, shares=shares, shared=shared)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rollout:
    """A rollout and its rewards. `_T` are all of its calls, including those of agents that are not trained."""

    trajectory: Trajectory
    reward: float | None
    """The final reward; None if the rollout is masked."""
    selected: tuple[int, ...]
    """Indices of the calls of trained agents."""
    calls: Sequence[ModelCall]
    """The calls of trained agents."""
    num_sampled: int
    """Number of tokens that the calls of trained agents sampled."""
    intermediate_T: Floats
    """Rewards from AIR, and rewards that the agent's process emitted about a call or its tools."""
    reward_T: NDArray[np.float64]
    """The intermediate rewards, plus the final reward on the last call; NaN there if the rollout is masked."""
    cut: float
    """How much of the emitted rewards was beyond the bound."""
    states: Sequence[Hashable]
    """The state of each selected call; empty unless the method compares states."""
    return_T: NDArray[np.float64]
    """Discounted return of each call, including the final reward; NaN if the rollout is masked."""

    @classmethod
    def of(cls, trajectory: Trajectory, rules: CreditRules) -> _Rollout:
        discount, credit = rules.credit.discount, rules.credit
        reward = learned_reward(trajectory, rules.failures)
        intermediate_T = np.zeros(len(trajectory.calls), np.float64)
        if credit.emitted != "ignored":
            intermediate_T += emitted_rewards(trajectory, credit.reward_weights)
        has_emitted = bool(intermediate_T.any())
        if rules.air is not None:
            intermediate_T += rules.air.rewards(trajectory, reward_range=rules.reward_range, discount=discount)
        cut = 0.0
        if has_emitted and credit.emitted == "bounded":
            bounded_T = bounded(intermediate_T, rules.bound * rules.reward_range)
            cut, intermediate_T = float(np.abs(intermediate_T - bounded_T).sum()), bounded_T
        reward_T = intermediate_T.copy()
        reward_T[-1:] += math.nan if reward is None else reward
        selected = select_calls(trajectory.calls, rules.agents)
        keys: Sequence[Hashable] = ()
        if credit.method == "same_state":
            keys = states.state_keys(trajectory, rules.state_key or states.STATE_KEYS[credit.state_key])
        calls = [trajectory.calls[t] for t in selected]
        return cls(
            trajectory=trajectory,
            reward=reward,
            selected=selected,
            calls=calls,
            num_sampled=sum(call.response_T.size for call in calls),
            intermediate_T=intermediate_T.astype(np.float32),
            cut=cut,
            states=[keys[t] for t in selected] if keys else (),
            reward_T=reward_T,
            return_T=estimators.returns_to_go(reward_T, discount),
        )

    @property
    def final(self) -> float:
        """The final reward as a number, NaN if the rollout is masked."""
        return math.nan if self.reward is None else self.reward

    @property
    def total(self) -> float:
        """The sum of all rewards, without discount; NaN if the rollout is masked."""
        return self.final + float(self.intermediate_T.sum())


def emitted_rewards(trajectory: Trajectory, weights: Mapping[str, float]) -> NDArray[np.float64]:
    """The rewards that the agent's process emitted about each call; shape [len(trajectory.calls)], within
    LARGEST_REWARD, whose square float32 can represent.

    A reward about a tool goes to the call that caused the tool's use. `weights` maps names of rewards to factors; a
    name that is missing has factor 1.

    Example: Reward(name="format", value=0.5, about="call-1") with weights {"format": 0.2} -> [0, 0.1]
    """
    reward_T = np.zeros(len(trajectory.calls), np.float64)
    if trajectory.rewards:
        index = {call.call_id: t for t, call in enumerate(trajectory.calls)}
        index |= {tool.span_id: index[tool.call_id] for tool in trajectory.tools if tool.call_id in index}
        for reward in trajectory.rewards:
            if reward.about in index:
                reward_T[index[reward.about]] += weights.get(reward.name, 1.0) * reward.value
    return reward_T.clip(-LARGEST_REWARD, LARGEST_REWARD)


def _advantages(rollouts: Sequence[_Rollout], credit: CreditConfig) -> list[Floats]:
    """The advantages of each rollout's selected calls; zeros if the rollout is masked.

    identical      every call has the advantage of its rollout: the total reward, normalised over the group.
                   LightningRL, arXiv 2508.03680 section 3.3, where the total is the final reward.
    return_to_go   a call has its return: its reward and all later ones, discounted per call, normalised over the group.
    same_state     the advantage of "identical", plus `state_weight` times the advantage of the call over calls of other
                   rollouts in the same state: GiGPO, arXiv 2505.10978 eq. 8.
    gae            zeros: the learner's critic computes the advantage of each token from the rewards of the calls.

    With scale="batch" the learner then applies `estimators.whiten` to all advantages of the step: REINFORCE++.
    Shapes: `_R` the rollouts, `_C` the selected calls of all rollouts, one rollout after the other.
    """
    valid_R = np.array([rollout.reward is not None for rollout in rollouts], np.bool_)
    rollout_C = np.array([r for r, rollout in enumerate(rollouts) for _ in rollout.selected], np.int64)
    advantage_C = np.zeros(rollout_C.size, np.float64)
    if credit.method in ("identical", "same_state"):
        total_R = np.array([rollout.total for rollout in rollouts], np.float64)
        shared_R = estimators.normalise_group(
            total_R, valid_R, scale=credit.scale, baseline=credit.baseline, k=credit.pass_at
        )
        advantage_C += shared_R[rollout_C]
    if credit.method in ("return_to_go", "same_state"):
        valid_C = valid_R[rollout_C]
        return_C = np.array([rollout.return_T[t] for rollout in rollouts for t in rollout.selected])[valid_C]
        owner_C = rollout_C[valid_C]
        if credit.method == "return_to_go":
            own_C = estimators.normalise(return_C, owner_C, scale=credit.scale, baseline=credit.baseline)
        else:
            keys = [key for rollout in rollouts if rollout.reward is not None for key in rollout.states]
            step_C = estimators.same_state_advantages(return_C, owner_C, keys, scale=credit.scale)
            own_C = credit.state_weight * step_C
        advantage_C[valid_C] += own_C
    ends = np.cumsum([len(rollout.selected) for rollout in rollouts])
    return [part.astype(np.float32) for part in np.split(advantage_C, ends[:-1])] if rollouts else []


@dataclass(frozen=True, slots=True)
class _Share:
    """The contribution of one rollout to a Credit: its samples, or the reason why it has none."""

    samples: tuple[Sample, ...]
    reason: str | None
    dropped_tokens: Mapping[str, int]
    dropped_calls: Mapping[str, str] = field(default_factory=dict)
    """Call id -> reason, for calls whose row alone was dropped."""

    @classmethod
    def of(cls, rollout: _Rollout, advantage: Floats, *, is_useful: bool, rules: CreditRules) -> _Share:
        """`advantage` has the shape of the selected calls. `is_useful` is False if the group has no gradient."""
        reason = None
        if rollout.reward is None:
            reason = mask_reason(rollout.trajectory)
        elif rollout.num_sampled == 0:
            reason = NO_SELECTED_CALL
        elif not is_useful:
            reason = NO_SPREAD
        if reason is not None:
            return cls((), reason, {reason: rollout.num_sampled} if rollout.num_sampled else {})
        earned = estimators.carry_back(rollout.reward_T, rollout.selected)
        samples, dropped = to_samples(rollout.trajectory, rollout.calls, advantage, earned, max_tokens=rules.max_tokens)
        tokens: Counter[str] = Counter()
        for drop in dropped:
            tokens[drop.reason] += drop.tokens
        dropped_calls = {call_id: drop.reason for drop in dropped for call_id in drop.calls}
        return cls(samples, None if samples else OVERLONG_SAMPLE, tokens, dropped_calls)

    def stale(self) -> _Share:
        """The share without its samples, if it has any."""
        if not self.samples:
            return self
        num_trained = sum(int(sample.mask_T.sum()) for sample in self.samples)
        return replace(self, samples=(), reason=STALE, dropped_tokens={**self.dropped_tokens, STALE: num_trained})
