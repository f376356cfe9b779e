"""The toy world: its language, engine and learner are exact, and its engine fails on demand."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import group, model_call, trajectory

from agent_lightning.core.types import Batch, OnWeightUpdate, Outcome, Policy, RolloutKey, Task
from agent_lightning.credit import assign as credit
from agent_lightning.credit import batching
from agent_lightning.credit.assign import CreditRules
from agent_lightning.serving.engine import Completion, Part, Refusal, join_parts
from agent_lightning.serving.gate import Gate
from agent_lightning.testing.model import END, FIRST_WORD, ToyEngine, ToyLanguage, ToyLearner
from agent_lightning.testing.world import ToyWorld

LANGUAGE = ToyLanguage(("no", "yes", "call:2+3"))
TOOL = {"type": "function", "function": {"name": "calculator"}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


async def ask(engine: ToyEngine, *messages: dict[str, Any], **body: Any) -> Completion:
    completion = await engine.generate({"model": "policy", "messages": list(messages), **body})
    assert isinstance(completion, Completion), completion
    return completion


async def refused(engine: ToyEngine, *messages: object, **body: Any) -> Refusal:
    refusal = await engine.generate({"model": "policy", "messages": list(messages), **body})
    assert isinstance(refusal, Refusal)
    return refusal


def message_of(completion: Completion) -> dict[str, Any]:
    return dict(completion.reply["choices"][0]["message"])


# The language.


def test_prompts_are_encoded_in_full() -> None:
    assert ToyLanguage(("no", "yes")).encode([user("A")]).tolist() == [3, 73, END, 4]
    system = LANGUAGE.encode([{"role": "system", "content": "A"}, user("A")])
    assert system.tolist() == [2, 73, END, 3, 73, END, 4]


def test_the_last_message_chooses_the_row() -> None:
    plain = LANGUAGE.state(LANGUAGE.encode([user("A")]))
    later = LANGUAGE.encode([user("B"), {"role": "assistant", "content": "no"}, user("A")])
    tool = LANGUAGE.encode([user("B"), {"role": "tool", "content": "A"}])
    assert plain == LANGUAGE.state(later)
    assert plain != LANGUAGE.state(LANGUAGE.encode([user("B")]))
    assert LANGUAGE.state(tool) != LANGUAGE.state(LANGUAGE.encode([user("B")]))
    assert 0 <= LANGUAGE.state(LANGUAGE.encode([])) < LANGUAGE.num_states


# The engine.


async def test_the_next_prompt_extends_prompt_and_response() -> None:
    engine = ToyEngine(LANGUAGE)
    for _ in range(12):  # enough for every word, the tool call too
        first = await ask(engine, user("A"), tools=[TOOL])
        second = await ask(engine, user("A"), message_of(first), {"role": "tool", "content": "5"}, tools=[TOOL])
        history = [*first.choices[0].prompt_T.tolist(), *first.choices[0].response_T.tolist()]
        assert second.choices[0].prompt_T.tolist()[: len(history)] == history


async def test_words_with_the_prefix_are_tool_calls_if_the_request_has_tools() -> None:
    engine = ToyEngine(ToyLanguage(("call:2+3",)))
    plain = await ask(engine, user("A"))
    assert message_of(plain) == {"role": "assistant", "content": "call:2+3"}
    called = await ask(engine, user("A"), tools=[TOOL])
    (tool_call,) = message_of(called)["tool_calls"]
    assert tool_call["function"] == {"name": "calculator", "arguments": '{"expression": "2+3"}'}
    assert called.reply["choices"][0]["finish_reason"] == "tool_calls"
    assert called.choices[0].response_T.tolist() == plain.choices[0].response_T.tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
async def test_log_probabilities_are_those_of_the_samples(temperature: float) -> None:
    """Compares the frequencies of a trained policy's words with the probabilities that the engine reports."""
    engine, num = ToyEngine(LANGUAGE, seed=1), 4000
    learner = ToyLearner(LANGUAGE, lr=3.0)
    await learner.update([await batch_of(engine, "A", {"no": 0.0, "yes": 1.0, "call:2+3": 0.5})])
    await engine.install(await learner.publish())
    choices = (await ask(engine, user("A"), temperature=temperature, n=num)).choices
    counts = np.bincount([int(choice.response_T[0]) - FIRST_WORD for choice in choices], minlength=3)
    reported = {int(choice.response_T[0]) - FIRST_WORD: float(np.exp(choice.logprob_T[0])) for choice in choices}
    assert len(set(np.round(list(reported.values()), 3))) == 3
    assert sum(reported.values()) == pytest.approx(1.0, abs=1e-5)
    for word, probability in reported.items():
        assert counts[word] / num == pytest.approx(probability, abs=0.03)


async def test_temperature_zero_is_the_likeliest_word() -> None:
    engine = ToyEngine(LANGUAGE)
    for completion in [await ask(engine, user("A"), temperature=0) for _ in range(5)]:
        assert message_of(completion)["content"] == "no"
        assert completion.choices[0].logprob_T.tolist() == [0.0, 0.0]


async def test_the_same_seed_samples_the_same() -> None:
    answers = []
    for seed in (0, 0, 1):
        engine = ToyEngine(LANGUAGE, seed=seed)
        answers.append([message_of(await ask(engine, user("A")))["content"] for _ in range(30)])
    assert answers[0] == answers[1] != answers[2]


async def test_a_sample_depends_on_how_often_its_prompt_was_sent_and_not_on_other_prompts() -> None:
    async def sample(*texts: str) -> list[str]:
        engine = ToyEngine(LANGUAGE, seed=5)
        return [f"{text} {message_of(await ask(engine, user(text)))['content']}" for text in texts]

    assert sorted(await sample(*"AAABBB")) == sorted(await sample(*"BABBAA"))


async def test_max_tokens_cuts_the_end_of_an_answer() -> None:
    engine = ToyEngine(LANGUAGE)
    full, cut = await ask(engine, user("A"), max_tokens=2), await ask(engine, user("A"), max_tokens=1)
    assert (full.choices[0].response_T.size, full.choices[0].finish_reason) == (2, "stop")
    assert (cut.choices[0].response_T.size, cut.choices[0].finish_reason) == (1, "length")
    assert cut.reply["usage"] == {"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5}


async def test_refusals() -> None:
    engine = ToyEngine(LANGUAGE, max_len=10)
    assert (await ask(engine, user("123456"))).choices[0].finish_reason == "length"  # room for one token
    assert (await refused(engine, user("1234567"))).code == "context_length_exceeded"
    assert (await refused(engine, user("A"), max_tokens=0)).code == "invalid_request"
    assert (await refused(engine, user("A"), temperature=-1.0)).code == "invalid_request"
    assert (await refused(engine, user("A"), temperature="hot")).code == "invalid_request"
    assert (await refused(engine, {"role": "user", "content": 5})).code == "invalid_request"
    assert (await refused(engine, "A")).code == "invalid_request"
    engine.fail_next(2)
    codes = [(await refused(engine, user("A"))).code for _ in range(2)]
    assert codes == ["engine_error"] * 2
    await ask(engine, user("A"))


async def test_an_update_waits_for_slow_answers() -> None:
    engine = ToyEngine(LANGUAGE, delay_s=0.05)
    answering = asyncio.create_task(ask(engine, user("A")))
    await asyncio.sleep(0.01)
    await engine.install(await ToyLearner(LANGUAGE).publish())
    assert answering.done()
    assert ((await answering).policy_version, engine.version) == (0, 1)
    assert (await ask(engine, user("A"))).policy_version == 1


async def test_on_an_update_running_calls_are_restarted_or_kept_as_the_rule_says() -> None:
    for rule, expected in (("restart", (1, ())), ("keep", (0, ((1, 1),)))):
        engine = ToyEngine(LANGUAGE, delay_s=0.05, gate=Gate(rule))
        answering = asyncio.create_task(ask(engine, user("A")))
        await asyncio.sleep(0.01)
        await engine.install(await ToyLearner(LANGUAGE).publish())
        assert not answering.done()
        completion = await answering
        assert (completion.policy_version, completion.choices[0].new_versions) == expected


@pytest.mark.parametrize(
    ("rule", "seen", "versions"),
    [
        ("restart", False, (1, ())),
        ("restart", True, (0, ())),  # its first token cannot be taken back, so the update waits
        ("keep", True, (0, ((1, 1),))),
        ("wait", False, (0, ())),
    ],
)
async def test_an_update_during_a_stream(rule: OnWeightUpdate, seen: bool, versions: tuple[int, Any]) -> None:
    engine, parts = ToyEngine(LANGUAGE, delay_s=0.1, gate=Gate(rule)), list[Part | Refusal]()

    async def read() -> None:
        async for part in engine.stream({"model": "policy", "messages": [user("A")]}):
            parts.append(part)

    async with asyncio.timeout(5):
        reading = asyncio.create_task(read())
        while engine.in_flight == 0 or len(parts) < seen:
            await asyncio.sleep(0.005)
        await engine.install(await ToyLearner(LANGUAGE).publish())
        assert reading.done() == (rule == "wait" or (seen and rule == "restart"))
        await reading
    completion = join_parts([part for part in parts if isinstance(part, Part)])
    assert completion.choices[0].response_T.size == 2
    assert (completion.policy_version, completion.choices[0].new_versions) == versions


# The learner.


async def batch_of(engine: ToyEngine, text: str, rewards: dict[str, float], num: int = 24) -> Batch:
    """The batch of a group that answers this text, with a reward for each word."""
    ended = []
    for index in range(num):
        key = RolloutKey(split="train", group=0, index=index)
        completion = await ask(engine, user(text), temperature=1.0)
        (choice,) = completion.choices
        call = model_call(key, choice.prompt_T.tolist(), choice.response_T.tolist(), logprobs=choice.logprob_T.tolist())
        ended.append(trajectory(key, call, reward=rewards[message_of(completion)["content"]]))
    credits = credit.assign(group(*ended), CreditRules(max_tokens=100))
    (batch,) = batching.pack(credits.samples, rollouts_per_batch=None, pad_token=0)
    return batch


async def test_the_gradient_is_that_of_the_objective() -> None:
    """Compares with finite differences of the weighted, clipped objective, after a first update of the table."""
    engine, learner = ToyEngine(LANGUAGE, seed=3), ToyLearner(LANGUAGE, lr=0.5)
    batch = await batch_of(engine, "A", {"no": 0.0, "yes": 1.0, "call:2+3": 0.3})
    await learner.update([batch])
    before = learner.table.copy()
    state = LANGUAGE.state(LANGUAGE.encode([user("A")]))

    def objective(row: np.ndarray[Any, np.dtype[np.float64]]) -> float:
        logprobs = row - np.log(np.exp(row).sum())
        total = 0.0
        for n, t in np.argwhere(batch.mask_NT & (batch.token_NT >= FIRST_WORD)):
            ratio = np.exp(logprobs[batch.token_NT[n, t] - FIRST_WORD] - batch.logprob_NT[n, t])
            advantage = batch.advantage_NT[n, t]
            total += batch.weight_NT[n, t] * min(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
        return float(total)

    row, step = before[state].astype(np.float64), 1e-5
    numeric = [(objective(row + step * e) - objective(row - step * e)) / (2 * step) for e in np.eye(3)]
    await learner.update([batch])
    np.testing.assert_allclose((learner.table - before)[state] / 0.5, numeric, atol=1e-5)
    elsewhere = np.delete(np.abs(learner.table).sum(axis=1), state)
    assert not elsewhere.any()


async def test_metrics_of_an_update() -> None:
    engine, learner = ToyEngine(LANGUAGE, seed=3), ToyLearner(LANGUAGE, lr=200.0)
    batch = await batch_of(engine, "A", {"no": 0.0, "yes": 1.0, "call:2+3": 0.0})
    first = (await learner.update([batch])).metrics
    assert first["logprob_gap/max_abs"].value < 1e-6
    assert first["learner/clip_fraction"].value == 0.0
    assert first["learner/grad_norm"].value > 0.0
    second = (await learner.update([batch])).metrics  # off-policy now: every ratio is outside the clip range
    assert second["logprob_gap/max_abs"].value > 0.2
    assert second["learner/clip_fraction"].value == 1.0


async def test_a_saved_table_is_restored(tmp_path: Path) -> None:
    engine, learner = ToyEngine(LANGUAGE), ToyLearner(LANGUAGE)
    await learner.update([await batch_of(engine, "A", {"no": 0.0, "yes": 1.0, "call:2+3": 0.0})])
    await learner.publish()
    await learner.save(tmp_path / "a" / "b")
    other = ToyLearner(LANGUAGE)
    await other.restore(tmp_path / "a" / "b", 1)
    saved, restored = await learner.publish(), await other.publish()
    assert saved.version == restored.version == 2
    assert np.array_equal(saved.buckets[0].data, restored.buckets[0].data)
    await engine.install(restored)
    assert message_of(await ask(engine, user("A"), temperature=0))["content"] == "yes"


# The builders.


def test_builders() -> None:
    key = RolloutKey(split="train", group=4, index=0)
    call = model_call(key, [1, 5], [6, 7], agent="judge", version=2)
    assert (call.prompt_T.tolist(), call.response_T.tolist(), call.logprob_T.tolist()) == ([1, 5], [6, 7], [-1.0, -1.0])
    assert (call.agent, call.policy_version) == ("judge", 2)
    done = trajectory(key, call, reward=0.5)
    lost = trajectory(RolloutKey(split="train", group=4, index=1), outcome=Outcome.TIMEOUT)
    assert (done.reward, done.calls, lost.reward, lost.calls) == (0.5, (call,), None, ())
    both = group(done, lost)
    assert (both.group_id, both.trajectories) == ("train-4", (done, lost))
    assert model_call(key, [1], [2]).call_id != model_call(key, [1, 2], [3]).call_id


# The world.


async def test_an_error_in_the_block_is_raised_unchanged_and_everything_stops() -> None:
    async def solve(task: dict[str, Any], policy: Policy) -> float:
        return 1.0

    async def fail() -> None:
        async with ToyWorld(agent=solve, tasks=[Task(task_id="t", payload={})], words=("a",)) as world:
            await world.buffer.admit(world.tasks[0], split="train", num_rollouts=1)
            raise ZeroDivisionError

    before = asyncio.all_tasks()
    with pytest.raises(ZeroDivisionError):
        await fail()
    assert asyncio.all_tasks() == before


def test_the_toy_world_needs_neither_ray_nor_torch() -> None:
    code = "import sys, agent_lightning.testing.world; print({'ray', 'torch', 'vllm', 'verl'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


async def test_the_example_of_the_documentation() -> None:
    from openai import AsyncOpenAI

    async def solve(task: dict[str, Any], policy: Policy) -> float:
        messages: Any = [user(task["question"])]
        async with AsyncOpenAI(base_url=policy.base_url, api_key=policy.api_key) as client:
            reply = await client.chat.completions.create(model=policy.model, messages=messages)
        return float(reply.choices[0].message.content == task["answer"])

    tasks = [Task(task_id="sky", payload={"question": "The sky is", "answer": "blue"})]
    async with ToyWorld(agent=solve, tasks=tasks, words=("red", "green", "blue")) as world:
        state = await world.train(steps=8)
    assert (state.val_rewards[0], state.val_rewards[-1]) == ((0, 0.0), (8, 1.0))
