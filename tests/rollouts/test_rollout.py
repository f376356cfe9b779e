"""Agents in every mode, and every way in which a rollout can end: real agents, processes and HTTP."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import agents_for_tests as agents
import numpy as np
import pytest
from agents_for_tests import RUN_SECRET, is_alive, make_task, small_gateway

from agent_lightning.buffer.buffer import Buffer
from agent_lightning.buffer.taken import take_groups
from agent_lightning.config.running import AgentConfig, AgentMode
from agent_lightning.core.errors import AgentProcessError, ConfigError
from agent_lightning.core.types import Outcome, Policy, Task, Trajectory
from agent_lightning.credit.failures import Retries
from agent_lightning.rollouts.agents import check, load, run_agent
from agent_lightning.rollouts.client import Rollout
from agent_lightning.rollouts.worker import RolloutWorker

HERE = Path(__file__).parents[1] / "support"
FILE = f"{HERE}/agents_for_tests.py"
POLICY = Policy(version=1, base_url="http://127.0.0.1:9/v1", model="m", sampling={"temperature": 0.5})

PLACE = " (tests/support/agents_for_tests.py in does)"
"""Where the agents raise, without the line."""

ROLLOUT = Rollout(rollout_id="train-0-0", attempt=0, base_url=POLICY.base_url)


def without_line(error: str) -> str:
    """An error whose line in agents_for_tests.py may change, and without advice at its end."""
    return re.sub(r"(\.py):\d+ in", r"\1 in", error).split(" and agent.reward_max")[0]


def make_spec(target: str | Callable[..., object], mode: AgentMode = "async", **settings: object) -> AgentConfig:
    return AgentConfig(target=target, mode=mode, **{"timeout_s": 10.0, **settings})  # type: ignore[arg-type]


async def run_tasks(
    agent: AgentConfig, tasks: list[Task], buffer: Buffer | None = None, *, concurrency: int = 8
) -> list[Trajectory]:
    """The trajectories of one worker that runs each task once, behind a gateway."""
    buffer = buffer or Buffer(run_secret=RUN_SECRET)
    async with small_gateway(buffer) as url, asyncio.timeout(20), asyncio.TaskGroup() as group:
        worker = RolloutWorker(buffer=buffer, agent=agent, policy_url=url, model="m", concurrency=concurrency)
        group.create_task(worker.run())
        for task in tasks:
            await buffer.admit(task, split="train", num_rollouts=1)
        groups = await take_groups(buffer, len(tasks), split="train")
        await worker.stop()
    return [group.trajectories[0] for group in groups]


async def run_task(agent: AgentConfig, **payload: object) -> Trajectory:
    (trajectory,) = await run_tasks(agent, [make_task(3, **payload)])
    return trajectory


# Loading.


def test_targets_are_found_by_module_and_by_file(tmp_path: Path) -> None:
    assert load("json:dumps")({"a": 1}) == '{"a": 1}'
    assert load(f"{FILE}:score")({"number": 2}, 4) is True
    assert load(f"{FILE}:score") is load(f"{FILE}:score")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "agent.py").write_text(
            f"from beside_{folder} import NAME\ndef solve(payload): return NAME\n"
        )
        (tmp_path / folder / f"beside_{folder}.py").write_text(f"NAME = {folder!r}\n")
    assert [load(f"{tmp_path}/{folder}/agent.py:solve")({}) for folder in ("one", "two")] == ["one", "two"]


def test_relative_files_are_found_in_the_project() -> None:
    assert load("tests/support/agents_for_tests.py:score")({"number": 2}, 4) is True


@pytest.mark.parametrize(
    "target",
    ["nothing", "json:nothing", "no.such.module:f", "no/such/file.py:f", f"{FILE}:nothing", f"{FILE}:RUN_SECRET"],
)
def test_a_target_that_is_not_there_is_one_line(target: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(target)
    assert "\n" not in str(caught.value)
    assert target.rpartition(":")[0] in str(caught.value)


def test_a_file_whose_import_fails_can_be_tried_again(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("import no_such_package\n")
    with pytest.raises(ConfigError, match="no_such_package"):
        load(f"{file}:f")
    file.write_text("def f(): return 'mended now'\n")
    assert load(f"{file}:f")() == "mended now"


@pytest.mark.parametrize(
    ("agent", "mode", "message"),
    [
        (agents.blocks, "async", "use thread"),
        (agents.doubles, "thread", "is async"),
        (agents.blocks, "process", "name"),
        ("no-such-program --flag", "command", "no executable"),
        ("", "command", "no executable"),
        ("no/such/file.py:f", "process", "no file"),
        ("no.such.module:f", "async", "imported"),
    ],
)
def test_an_agent_that_cannot_run_is_found_before_the_run(agent: str, mode: AgentMode, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(agent, mode)


# Running.


@pytest.mark.parametrize(
    ("target", "mode"),
    [
        (agents.doubles, "async"),
        (f"{FILE}:doubles", "async"),
        (agents.doubles_blocking, "thread"),
        (f"{FILE}:doubles", "process"),
        (f"{FILE}:doubles_from_environment", "process"),
    ],
)
async def test_an_agent_that_works_in_each_mode(target: str | Callable[..., object], mode: AgentMode) -> None:
    trajectory = await run_task(make_spec(target, mode, reward=f"{FILE}:score"))
    assert (trajectory.outcome, trajectory.reward, trajectory.error) == (Outcome.FINISHED, 1.0, "")
    assert trajectory.output == "6"
    assert [call.key for call in trajectory.calls] == [trajectory.key]


async def test_a_command_reads_its_task_and_prints_its_reward(tmp_path: Path) -> None:
    script = tmp_path / "agent.sh"
    script.write_text(
        'curl_body="{\\"number\\": 3}"\n'
        f"""{sys.executable} -c 'import os, sys; sys.path.insert(0, "{HERE}")
import agents_for_tests as a, json
task = json.loads(os.environ["AGL_TASK"])
assert task == json.load(sys.stdin)
print(a.ask_blocking(os.environ["OPENAI_BASE_URL"], number=task["number"]) / 12)'
echo
"""
    )
    trajectory = await run_task(make_spec(f"sh {script}", "command"))
    assert (trajectory.outcome, trajectory.reward, trajectory.error) == (Outcome.FINISHED, 0.5, "")


async def test_a_task_too_long_for_a_variable_is_on_stdin() -> None:
    code = "import os,sys; print('AGL_TASK' in os.environ, len(sys.stdin.read()) > 200000)"
    task = make_task(text="x" * 200_000)
    assert await run_agent(f'{sys.executable} -c "{code}"', "command", task, POLICY, ROLLOUT) == "False True"


async def test_a_command_finds_the_policy_whichever_api_it_speaks() -> None:
    names = "$OPENAI_BASE_URL $ANTHROPIC_BASE_URL $ANTHROPIC_API_KEY $GOOGLE_GEMINI_BASE_URL $GEMINI_API_KEY"
    command = f"sh -c 'echo {names}'"
    printed = str(await run_agent(command, "command", make_task(), POLICY, ROLLOUT))
    openai_url, anthropic_url, key, *google = printed.split()
    assert google == [anthropic_url, key]
    assert openai_url == f"{anthropic_url}/v1" == POLICY.base_url
    assert (anthropic_url, key) == (POLICY.anthropic_base_url, POLICY.api_key)


async def test_a_command_need_not_read_its_task() -> None:
    assert await run_agent("echo done", "command", make_task(text="x" * 500_000), POLICY, ROLLOUT) == "done"


async def test_a_process_gets_the_payload_and_the_policy() -> None:
    task = Task(task_id="t", payload={"row": np.arange(2), "weight": np.float64(0.5)})
    result = await run_agent(f"{FILE}:returns_the_payload", "process", task, POLICY, ROLLOUT)
    assert result == {"payload": {"row": [0, 1], "weight": 0.5}, "model": "m", "temperature": 0.5}


async def test_a_process_may_print_more_than_is_kept() -> None:
    code = "print(('x' * 1000 + chr(10)) * 5000); print(0.25)"
    assert await run_agent(f'{sys.executable} -c "{code}"', "command", make_task(), POLICY, ROLLOUT) == "0.25"


async def test_processes_that_fail() -> None:
    failures = {
        f"{FILE}:dies": "ValueError: it died",
        f"{FILE}:exits_quietly": "without a result",
        f"{FILE}:make_task": "cannot be handed",
    }
    runs = [run_agent(target, "process", make_task(), POLICY, ROLLOUT) for target in failures]
    for message, error in zip(failures.values(), await asyncio.gather(*runs, return_exceptions=True), strict=True):
        assert isinstance(error, AgentProcessError)
        assert message in str(error)


@pytest.mark.parametrize(("command", "message"), [("false", "exit code 1"), ("ls /no/such/folder", "No such file")])
async def test_a_command_that_fails(command: str, message: str) -> None:
    with pytest.raises(AgentProcessError, match=message):
        await run_agent(command, "command", make_task(), POLICY, ROLLOUT)


async def read_pids(file: Path) -> list[int]:
    async with asyncio.timeout(10):
        while not (file.exists() and file.read_text().endswith("\n")):
            await asyncio.sleep(0.02)
    return [int(word) for word in file.read_text().split()]


async def are_gone(pids: list[int]) -> bool:
    for _ in range(50):  # the grandchild is buried by init, in its own time
        if not any(is_alive(pid) for pid in pids):
            return True
        await asyncio.sleep(0.02)
    return False


async def test_a_cancelled_process_is_gone_with_its_children(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    agent = run_agent(f"{FILE}:hangs_with_a_grandchild", "process", make_task(pids=str(file)), POLICY, ROLLOUT)
    running = asyncio.create_task(agent)
    pids = await read_pids(file)
    assert all(is_alive(pid) for pid in pids)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not is_alive(pids[0])
    assert await are_gone(pids)


async def test_what_a_process_leaves_behind_is_gone_too_and_does_not_hold_its_result(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    async with asyncio.timeout(10):
        task = make_task(pids=str(file))
        assert await run_agent(f"{FILE}:leaves_a_grandchild", "process", task, POLICY, ROLLOUT) == 0.5
    assert await are_gone(await read_pids(file))


async def test_daemons_that_left_their_group_are_gone_too(tmp_path: Path) -> None:
    """As a shell and as Python start them: in a session of their own, twice forked, deaf to SIGTERM."""
    file = tmp_path / "pids"
    python = "import os, signal, sys, time; signal.signal(15, signal.SIG_IGN); os.fork() and os._exit(0); os.setsid();"
    python += f" os.fork() and os._exit(0); open('{file}', 'a').write(str(os.getpid()) + '\\n'); time.sleep(600)"
    script = tmp_path / "agent.sh"
    script.write_text(
        f"""{sys.executable} -c "{python}"\nsetsid sh -c 'echo $$ >> {file}; exec sleep 600' &\nsleep 600\n"""
    )
    running = asyncio.create_task(run_agent(f"sh {script}", "command", make_task(), POLICY, ROLLOUT))
    async with asyncio.timeout(20):
        while len(pids := await read_pids(file)) < 2:
            await asyncio.sleep(0.02)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await are_gone(pids)


# Outcomes.


@pytest.mark.parametrize(
    ("do", "outcome", "message"),
    [
        ("return", Outcome.FINISHED, ""),
        ("true", Outcome.FINISHED, ""),
        ("numpy", Outcome.FINISHED, ""),
        ("raise", Outcome.AGENT_ERROR, f"ValueError: first line{PLACE}"),
        ("raise a timeout", Outcome.AGENT_ERROR, f"TimeoutError: of its own{PLACE}"),
        ("raise a group", Outcome.AGENT_ERROR, f"ValueError: inner{PLACE}"),
        ("exit", Outcome.AGENT_ERROR, f"AgentProcessError: sys.exit(3) was called{PLACE}"),
        ("cancel", Outcome.AGENT_ERROR, "CancelledError: no message"),
        ("hang", Outcome.TIMEOUT, "not done after 0.5 s"),
        ("refuse to stop", Outcome.TIMEOUT, "not done after 0.5 s"),
        ("never stop", Outcome.TIMEOUT, "not done after 0.5 s"),
        ("none", Outcome.BAD_REWARD, "RewardError: the agent returned nothing and emitted no reward"),
        ("nan", Outcome.BAD_REWARD, "RewardError: the reward is nan"),
        ("infinity", Outcome.BAD_REWARD, "RewardError: the reward is inf"),
        ("string", Outcome.BAD_REWARD, "RewardError: the reward is a str, not a number"),
        ("too much", Outcome.BAD_REWARD, "RewardConfigError: the reward 1.5 is outside [0, 1]: set agent.reward_min"),
    ],
)
async def test_every_way_an_async_agent_can_end(do: str, outcome: Outcome, message: str) -> None:
    timeout_s = 0.5 if outcome is Outcome.TIMEOUT else 30.0
    trajectory = await run_task(make_spec(agents.does, timeout_s=timeout_s), do=do)
    assert (trajectory.outcome, without_line(trajectory.error)) == (outcome, message)
    assert (trajectory.reward is None) == (outcome is not Outcome.FINISHED)
    assert len(trajectory.calls) == 1  # what was recorded stays, whatever the end


async def test_an_agent_without_a_model_call() -> None:
    assert (await run_task(make_spec(agents.calls_nothing))).outcome is Outcome.NO_MODEL_CALL


@pytest.mark.parametrize("outcome", [Outcome.OVERLONG_PROMPT, Outcome.ENGINE_ERROR, Outcome.TOO_MANY_CALLS])
async def test_the_gateways_reason_names_the_outcome(outcome: Outcome) -> None:
    spec = make_spec(agents.is_refused)
    trajectory = await run_task(spec, fail=str(outcome), handles=False)
    assert (trajectory.outcome, trajectory.error) == (outcome, f"the gateway says {outcome}")
    assert (await run_task(spec, fail=str(outcome), handles=True)).outcome is Outcome.FINISHED
    trajectory = await run_task(spec, fail=str(outcome), handles=True, own_bug=True)
    assert trajectory.outcome is Outcome.AGENT_ERROR
    assert trajectory.error.startswith("KeyError: 'its own bug' (tests/support/agents_for_tests.py:")


async def test_threads_that_hang_take_no_slot_from_others() -> None:
    spec = make_spec(agents.blocks, "thread", timeout_s=1.0)
    before = time.monotonic()
    tasks = [make_task(n, seconds=30.0) for n in range(3)] + [make_task(9, seconds=0.0)]
    outcomes = [trajectory.outcome for trajectory in await run_tasks(spec, tasks, concurrency=2)]
    assert outcomes == [Outcome.TIMEOUT] * 3 + [Outcome.NO_MODEL_CALL]
    assert time.monotonic() - before < 20.0


async def test_stop_iteration_in_a_thread_is_an_error_like_another() -> None:
    assert (await run_task(make_spec(agents.raises_stop_iteration, "thread"))).outcome is Outcome.AGENT_ERROR


async def test_a_process_that_hangs_is_a_timeout_and_gone(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    for timeout_s in (1.5, 6.0, 24.0):  # on a busy machine the process may be killed before it has done anything
        spec = make_spec(f"{FILE}:hangs_with_a_grandchild", "process", timeout_s=timeout_s)
        assert (await run_task(spec, pids=str(file))).outcome is Outcome.TIMEOUT
        if file.exists() and file.read_text().endswith("\n"):
            break
    assert await are_gone(await read_pids(file))


@pytest.mark.parametrize(
    ("reward_target", "outcome", "message"),
    [
        (agents.score, Outcome.FINISHED, ""),
        (agents.score_async, Outcome.FINISHED, ""),
        (agents.score_raises, Outcome.SCORER_ERROR, "KeyError: 'no such answer'"),
        (agents.score_hangs, Outcome.SCORER_ERROR, "the reward function was not done after 0.5 s"),
    ],
)
async def test_every_way_a_score_can_end(reward_target: Callable[..., object], outcome: Outcome, message: str) -> None:
    timeout_s = 0.5 if reward_target is agents.score_hangs else 30.0
    trajectory = await run_task(make_spec(agents.doubles, reward=reward_target, timeout_s=timeout_s))
    assert (trajectory.outcome, trajectory.output) == (outcome, "6")
    assert trajectory.error.startswith(message)


async def test_a_command_that_prints_no_number_has_no_reward() -> None:
    trajectory = await run_task(make_spec("echo hello", "command"))
    assert (trajectory.outcome, trajectory.output) == (Outcome.BAD_REWARD, "hello")


async def test_the_secret_of_the_url_shows_in_no_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    trajectory = await run_task(make_spec(agents.does), do="raise the url")
    assert f"/attempt/0/{'*' * 32}/agent/v1" in trajectory.error
    seen = [record.getMessage() for record in caplog.records if record.name.startswith("agent_lightning")]
    assert any(f"/{'*' * 32}/" in line for line in seen)


# The worker.


async def test_a_worker_runs_many_at_a_time_and_no_more_than_it_may() -> None:
    running, most = 0, 0

    async def agent(payload: dict[str, object], policy: Policy) -> float:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        return 1.0

    trajectories = await run_tasks(make_spec(agent), [make_task(n) for n in range(20)], concurrency=4)
    assert (len(trajectories), most) == (20, 4)


async def test_errors_of_tools_are_told_from_those_of_agents() -> None:
    spec = make_spec(agents.does, tool_errors=("*CannotConnect*", "ValueError: first *"))
    assert (await run_task(spec, do="raise")).outcome is Outcome.TOOL_ERROR
    assert (await run_task(spec, do="raise a timeout")).outcome is Outcome.AGENT_ERROR


async def test_an_engine_error_is_tried_again() -> None:
    buffer = Buffer(run_secret=RUN_SECRET, retries=Retries(max_attempts=3))
    task = make_task(fail="engine_error", handles=False)
    (trajectory,) = await run_tasks(make_spec(agents.is_refused), [task], buffer)
    assert (trajectory.outcome, trajectory.key.attempt) == (Outcome.ENGINE_ERROR, 2)


async def test_an_agent_that_met_no_gateway_is_not_at_fault_and_runs_again_once_there_is_one() -> None:
    buffer, outage = Buffer(run_secret=RUN_SECRET, retries=Retries(max_attempts=2)), agents.Outage()
    async with small_gateway(buffer, outage) as url, asyncio.timeout(20), asyncio.TaskGroup() as group:
        worker = RolloutWorker(buffer=buffer, agent=make_spec(agents.does), policy_url=url, model="m")
        group.create_task(worker.run())
        await buffer.admit(make_task(3, do="return"), split="train", num_rollouts=1)
        while outage.refused < 4:  # the agent's own calls, and the worker's questions after them
            await asyncio.sleep(0.01)
        stats = await buffer.stats()
        assert (stats.running, stats.retried) == (1, 0)  # it waits, and spends no attempt
        outage.over = True
        (taken,) = await take_groups(buffer, 1, split="train")
        await worker.stop()
    (trajectory,) = taken.trajectories
    assert (trajectory.outcome, trajectory.key.attempt) == (Outcome.FINISHED, 1)
    assert (await buffer.stats()).failed == {}


async def test_a_gateway_that_is_gone_is_found_again_where_it_is_now() -> None:
    buffer, delays = Buffer(run_secret=RUN_SECRET, retries=Retries(max_attempts=2)), list[float]()
    async with small_gateway(buffer) as url, AsyncExitStack() as first, asyncio.timeout(20):

        async def find(seconds: float) -> str:
            delays.append(seconds)
            return url

        async def run(policy_url: str) -> Trajectory:
            spec = make_spec(agents.does)
            worker = RolloutWorker(buffer=buffer, agent=spec, policy_url=policy_url, model="m", find=find)
            async with asyncio.TaskGroup() as group:
                group.create_task(worker.run())
                await buffer.admit(make_task(3, do="return"), split="train", num_rollouts=1)
                await take_groups(buffer, 1, split="train")
                await first.aclose()
                await buffer.admit(make_task(3, do="return"), split="train", num_rollouts=1)
                (taken,) = await take_groups(buffer, 1, split="train")
                await worker.stop()
            return taken.trajectories[0]

        moved = await run(await first.enter_async_context(small_gateway(buffer)))
        assert (moved.outcome, moved.key.attempt, len(delays)) == (Outcome.FINISHED, 1, 1)
        told = await run("http://127.0.0.1:9")  # a worker in the place of another, told of what is gone
        assert (told.outcome, told.key.attempt, len(delays)) == (Outcome.FINISHED, 0, 2)


async def test_a_stopped_worker_gives_its_rollouts_back() -> None:
    buffer = Buffer(run_secret=RUN_SECRET, retries=Retries(max_attempts=2))
    worker = RolloutWorker(buffer=buffer, agent=make_spec(agents.score_hangs), policy_url="http://x", model="m")
    running = asyncio.create_task(worker.run())
    await buffer.admit(make_task(), split="train", num_rollouts=1)
    while (await buffer.stats()).running == 0:
        await asyncio.sleep(0.01)
    await worker.stop()
    await running
    (again,) = await buffer.lease(1, 1.0)
    assert again.key.attempt == 1


async def test_a_worker_survives_rollouts_that_the_buffer_cancelled() -> None:
    buffer = Buffer(run_secret=RUN_SECRET)
    worker = RolloutWorker(buffer=buffer, agent=make_spec(agents.blocks, "thread"), policy_url="http://x", model="m")
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        group.create_task(worker.run())
        await buffer.admit(make_task(seconds=0.2), split="train", num_rollouts=1)
        while (await buffer.stats()).running == 0:
            await asyncio.sleep(0.01)
        await buffer.cancel("not needed")
        await buffer.admit(make_task(seconds=0.0), split="train", num_rollouts=1)
        outcomes = [taken.trajectories[0].outcome for taken in await take_groups(buffer, 2, split="train")]
        while (await buffer.stats()).refused_finishes == 0:
            await asyncio.sleep(0.01)
        await worker.stop()
    assert outcomes == [Outcome.CANCELLED, Outcome.NO_MODEL_CALL]


async def test_a_worker_whose_agent_is_missing_does_not_start() -> None:
    with pytest.raises(ConfigError, match="no function 'nothing'"):
        RolloutWorker(
            buffer=Buffer(run_secret=RUN_SECRET), agent=make_spec(f"{FILE}:nothing"), policy_url="http://x", model="m"
        )
    assert os.environ.get("AGL_TASK") is None  # nothing leaks into this process


@pytest.mark.parametrize("text", ["def solve(:\n", "import no_such_module_at_all\n", "unknown_name\n"])
def test_a_file_that_cannot_be_imported_is_a_config_error_in_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "agent.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match="cannot be imported"):
        load(f"{file}:solve")


def test_a_package_named_like_one_of_python_says_so() -> None:
    with pytest.raises(ConfigError, match=r"No module named 'json\.agent'; Python has a module 'json' of its own"):
        load("json.agent:solve")


# Agents of a project of one's own.

PACKAGE = {
    "mypkg/__init__.py": "",
    "mypkg/agent.py": "from .tools.names import NAME\nfrom mypkg import words\n"
    "def solve(payload): return NAME + words.END\n"
    "class Solver:\n    @staticmethod\n    def solve(payload): return NAME\n",
    "mypkg/tools/__init__.py": "",
    "mypkg/tools/names.py": "from ..words import END\nNAME = 'inside'\n",
    "mypkg/words.py": "END = '!'\n",
}


@pytest.mark.parametrize("form", ["regular", "namespace", "src"])
@pytest.mark.parametrize(
    "target", ["{p}mypkg/agent.py:solve", "mypkg.agent:solve", "mypkg.agent:Solver.solve", "{abs}/mypkg/agent.py:solve"]
)
@pytest.mark.parametrize("mode", ["thread", "process"])
async def test_an_agent_in_a_package_loads_by_file_and_by_name(
    tmp_path: Path, form: str, target: str, mode: AgentMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = f"mypkg_{abs(hash((form, target, mode)))}"
    root = tmp_path / "src" if form == "src" else tmp_path
    for name, text in PACKAGE.items():
        if form == "namespace" and name.endswith("__init__.py"):
            continue
        file = root / name.replace("mypkg", package)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.replace("mypkg", package))
    monkeypatch.chdir(tmp_path)
    if form == "src" and "/" not in target:
        monkeypatch.chdir(root)
    given = target.format(p="src/" if form == "src" else "", abs=root).replace("mypkg", package)
    assert str(await run_agent(given, mode, make_task(), POLICY, ROLLOUT)).startswith("inside")


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("import openai\nclient = openai.OpenAI(api_key=None)\n", "solve", "OpenAIError: .*broken.py:2 in <module>"),
        ("def f():\n    raise RuntimeError('at import')\nf()\n", "solve", "RuntimeError: at import .*broken.py:2 in f"),
        ("def solve(payload): return 1\n", "slove", "no function 'slove' .*did you mean solve?"),
        ("def f(:\n", "f", "SyntaxError: .*broken.py:1"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line_with_the_place(
    tmp_path: Path, text: str, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(f"{tmp_path}/broken.py:{name}")
