"""From spans to samples, on one core, as JSON: seconds and memory, and how both grow with the number of rollouts.

    python benchmarks/traces.py                       # 1,000, 10,000 and 100,000 rollouts
    python benchmarks/traces.py --rollouts 10000 --air

A rollout has 5 calls of 2,000 tokens; its prompts extend each other or, with --shape apart, do not. `seconds` is of
tools, selection, credit, chains and samples. `memory` is the most that the process grew while it worked, over the
bytes of the spans and samples that it then held; sizes above --hold are worked off group by group, as the loop would
do with steps of that size.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import psutil

from agent_lightning.config.learning import CreditConfig
from agent_lightning.core.types import Group, ModelCall, Outcome, RolloutKey, Task, Trajectory
from agent_lightning.credit.air import Air
from agent_lightning.credit.assign import Credit, CreditRules, assign
from agent_lightning.spans.assemble import assemble

CALLS, TOKENS, RESPONSE, GROUP = 5, 2000, 200, 8
REPLY = '{"role":"assistant","tool_calls":[{"id":"%s","function":{"name":"search","arguments":"{\\"q\\": %d}"}}]}'
REQUEST = '[{"role":"tool","tool_call_id":"%s","content":"found"}]'


def make_group(number: int, rng: np.random.Generator, shape: str) -> Group:
    """A group of GROUP rollouts with random tokens and rewards."""
    trajectories = []
    for index in range(GROUP):
        key = RolloutKey(split="train", group=number, index=index)
        tokens = rng.integers(0, 50_000, (CALLS, TOKENS), dtype=np.int32)
        if shape == "chain":  # one conversation that grows to TOKENS
            tokens[:] = tokens[-1]
        ends = [TOKENS * (n + 1) // CALLS if shape == "chain" else TOKENS for n in range(CALLS)]
        calls = tuple(
            ModelCall(
                key=key,
                call_id=f"{number}-{index}-{n}",
                agent="agent",
                policy_version=0,
                prompt_T=tokens[n, : end - RESPONSE].copy(),
                response_T=tokens[n, end - RESPONSE : end].copy(),
                logprob_T=-rng.standard_exponential(RESPONSE, dtype=np.float32),
                finish_reason="tool_calls",
                started_at=float(n),
                ended_at=float(n),
                request=REQUEST % f"t{n - 1}",
                reply=REPLY % (f"t{n}", n),
            )
            for n, end in enumerate(ends)
        )
        reward = float(rng.integers(0, 2))
        trajectories.append(
            Trajectory(key=key, task_id=str(number), calls=calls, reward=reward, outcome=Outcome.FINISHED)
        )
    task = Task(task_id=str(number), payload={})
    return Group(group_id=f"train-{number}", task=task, trajectories=tuple(trajectories))


def assembled(group: Group) -> Group:
    """As the buffer hands a group out: its spans in order, and the tools that its requests tell of."""
    rebuilt = []
    for trajectory in group.trajectories:
        seen = assemble(trajectory.key, trajectory.calls, ())
        rebuilt.append(replace(trajectory, calls=seen.calls, tools=seen.tools))
    return replace(group, trajectories=tuple(rebuilt))


def arrays(groups: list[Group], credits: list[Credit]) -> int:
    """Bytes of the arrays of spans and samples."""
    calls = [c for group in groups for t in group.trajectories for c in t.calls]
    spans = sum(c.prompt_T.nbytes + c.response_T.nbytes + c.logprob_T.nbytes for c in calls)
    rows = [s for credit in credits for s in credit.samples]
    arrays = ("token_T", "mask_T", "logprob_T", "advantage_T", "reward_T", "call_T")
    return spans + sum(getattr(row, name).nbytes for row in rows for name in arrays)


def parts(groups: int, hold: bool, shape: str) -> Iterator[list[Group]]:
    rng = np.random.default_rng(0)
    if hold:
        yield [make_group(number, rng, shape) for number in range(groups)]
        return
    for number in range(groups):
        yield [make_group(number, rng, shape)]


def measure(rollouts: int, *, hold: bool, shape: str, air: bool) -> dict[str, Any]:
    credit = CreditConfig(method="return_to_go") if air else CreditConfig()
    rules = CreditRules(credit=credit, air=Air() if air else None)
    process, seconds, tokens, memory = psutil.Process(), 0.0, 0, None
    for groups in parts(rollouts // GROUP, hold, shape):
        before = process.memory_info().rss
        started = time.process_time()
        credits = [assign(assembled(group), rules) for group in groups]
        seconds += time.process_time() - started
        tokens += sum(credit.sampled_tokens for credit in credits)
        if hold:
            grown = process.memory_info().rss - before
            spans = arrays(groups, [])
            memory = round((spans + grown) / arrays(groups, credits), 3)
    return {
        "rollouts": rollouts,
        "seconds": round(seconds, 2),
        "us_per_rollout": round(1e6 * seconds / rollouts, 1),
        "sampled_tokens": tokens,
        "memory": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--hold", type=int, default=10_000, help="largest number that is held in memory at once")
    parser.add_argument("--shape", choices=("chain", "apart"), default="chain")
    parser.add_argument("--air", action="store_true", help="with intermediate rewards and returns to go")
    options = parser.parse_args()
    sizes = [
        measure(number, hold=number <= options.hold, shape=options.shape, air=options.air)
        for number in options.rollouts
    ]
    result = {"benchmark": "traces", "shape": options.shape, "air": options.air, "sizes": sizes}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
