"""A run in nine processes, each of which may be killed: buffer, gateway, two policy replicas, two rollout workers, the
learner, and the driver with the board. The engine is the toy engine, everything else is as in a run on Ray.

The processes write down what must hold at the end: the gateway each span that the buffer has acknowledged, the driver
each group that it has taken.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn
from processes import Peer, end_with, listen

from agent_lightning.buffer.buffer import Buffer
from agent_lightning.config.learning import AlgorithmConfig
from agent_lightning.config.running import AgentConfig, BufferConfig, LoopConfig
from agent_lightning.core.types import Group, ModelCall, Policy, Task
from agent_lightning.credit.assign import CreditRules
from agent_lightning.credit.failures import Retries
from agent_lightning.rollouts.worker import RolloutWorker
from agent_lightning.run.loop import Loop
from agent_lightning.run.state import STATE_FILE, Plan, State, checkpoint_folder, newest_checkpoint, read_state
from agent_lightning.run.tasks import TaskCursor
from agent_lightning.serving.engine import Completion, Refusal
from agent_lightning.serving.gate import Gate
from agent_lightning.serving.gateway import RETRY_HEADER, Gateway, GatewayConfig, application
from agent_lightning.serving.policy import PolicyBoard
from agent_lightning.testing.model import PAD, ToyEngine, ToyLanguage, ToyLearner
from agent_lightning.testing.world import MODEL, SAMPLING, QuietObserver

WORDS = ("red", "green", "blue")
TASKS = tuple(Task(task_id=f"t{n}", payload={"question": f"q{n}", "answer": WORDS[n % 3]}) for n in range(4))
REPLICAS, WORKERS, ROLLOUTS, PATIENCE_S = 2, 2, 8, 60.0
PARTS = ("buffer", "learner", "driver", "policy-0", "policy-1", "gateway", "worker-0", "worker-1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProcesses:
    """The files and the port by which the processes of a run find each other.

    A run whose driver or learner dies is resumed by a new set of processes, the next `incarnation`.
    """

    folder: Path
    incarnation: int
    port: int
    run_secret: bytes
    steps: int
    seed: int
    max_lag: int = 0

    def at(self, part: str) -> Path:
        return self.folder / f"{self.incarnation}-{part}"

    @property
    def acknowledged(self) -> Path:
        return self.folder / "acknowledged.jsonl"

    @property
    def taken(self) -> Path:
        return self.folder / "taken.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def result(self) -> Path:
        return self.folder / "result.json"

    @property
    def ready(self) -> Path:
        """A file that exists once workers may start."""
        return self.at("ready")

    def buffer(self) -> Any:
        return Peer(self.at("buffer"), cls=Buffer, patience_s=PATIENCE_S)


def new_incarnation(folder: Path, incarnation: int, **settings: int) -> RunProcesses:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    secret = secrets.token_bytes(32)
    return RunProcesses(folder=folder, incarnation=incarnation, port=port, run_secret=secret, **settings)


def run_part(part: str, run: RunProcesses, parent: int) -> None:
    """Run one part in this process until it is killed; the driver ends when the run does."""
    kind = part.partition("-")[0]
    asyncio.run(_run_part(kind, part, run, parent))


async def _run_part(kind: str, part: str, run: RunProcesses, parent: int) -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, _print_stacks)
    watching = asyncio.create_task(end_with(parent))
    work = {
        "buffer": _buffer, "learner": _learner, "driver": _driver, "policy": _policy, "gateway": _gateway,
        "worker": _worker,
    }[kind]  # fmt: skip
    await work(part, run)
    watching.cancel()


def _print_stacks() -> None:
    """Print where each task of this process waits."""
    for task in asyncio.all_tasks():
        task.print_stack(limit=3, file=sys.stderr)


async def _buffer(part: str, run: RunProcesses) -> None:
    journal, config, retries = run.folder / "journal", BufferConfig(segment_mib=0.25), Retries(max_attempts=1000)
    buffer = Buffer(run_secret=run.run_secret, retries=retries, grace=0.3, journal=journal, config=config)
    await (await listen(run.at(part), buffer)).serve_forever()


async def _learner(part: str, run: RunProcesses) -> None:
    await (await listen(run.at(part), ToyLearner(ToyLanguage(WORDS)))).serve_forever()


async def _policy(part: str, run: RunProcesses) -> None:
    gate = Gate("keep" if run.max_lag else "wait")
    engine = ToyEngine(ToyLanguage(WORDS), seed=run.seed + int(part[-1]), delay_s=0.03, gate=gate)
    board: Any = Peer(run.at("board"), cls=PolicyBoard, patience_s=PATIENCE_S)
    await engine.join(board)
    await listen(run.at(part), engine)
    await engine.follow()


class Replicas:
    """The gateway's engine: sends each call to a random replica."""

    def __init__(self, run: RunProcesses) -> None:
        self._peers: list[Any] = [Peer(run.at(f"policy-{number}")) for number in range(REPLICAS)]

    async def generate(self, request: Mapping[str, Any]) -> Completion | Refusal:
        try:
            reply: Completion | Refusal = await random.choice(self._peers).generate(request)
        except (ConnectionError, FileNotFoundError) as error:
            return Refusal(status=500, message=str(error), code="engine_error", type="server_error")
        return reply


class Witness:
    """The gateway's recorder: the buffer, with a note of each call that the buffer has acknowledged."""

    def __init__(self, run: RunProcesses) -> None:
        self._buffer = run.buffer()
        self._file = os.open(run.acknowledged, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.note_failure = self._buffer.note_failure
        self.record_spans = self._buffer.record_spans

    async def record(self, call: ModelCall) -> int:
        left: int = await self._buffer.record(call)
        note = {"rollout": call.key.rollout_id, "attempt": call.key.attempt, "call": call.call_id}
        os.write(self._file, json.dumps(note).encode() + b"\n")
        return left


async def _gateway(part: str, run: RunProcesses) -> None:
    config = GatewayConfig(model=MODEL, run_secret=run.run_secret, sampling=SAMPLING)
    gateway: Any = Gateway(engine=Replicas(run), recorder=Witness(run), config=config)  # type: ignore[arg-type]
    settings = uvicorn.Config(
        application(gateway), host="127.0.0.1", port=run.port, log_config=None, access_log=False, lifespan="off"
    )
    await uvicorn.Server(settings).serve()


async def solve(payload: Mapping[str, Any], policy: Policy) -> float:
    """An agent that makes two calls, and repeats those that fail, as client libraries do."""
    answer, messages = "", []
    async with aiohttp.ClientSession() as http:
        for question in (payload["question"], "are you sure?"):
            messages.append({"role": "user", "content": question})
            answer = await _ask(http, policy, messages)
            messages.append({"role": "assistant", "content": answer})
    return float(answer == payload["answer"])


async def _ask(http: aiohttp.ClientSession, policy: Policy, messages: Sequence[Mapping[str, str]]) -> str:
    for retry in range(8):
        body = {"model": policy.model, "messages": list(messages)}
        try:
            async with http.post(
                f"{policy.base_url}/chat/completions", json=body, headers={RETRY_HEADER: str(retry)}
            ) as reply:
                if reply.status < 500:
                    reply.raise_for_status()
                    return str((await reply.json())["choices"][0]["message"]["content"])
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError):
            pass
        await asyncio.sleep(0.05 * 2**retry)
    raise ConnectionError("the gateway does not answer")


async def _worker(part: str, run: RunProcesses) -> None:
    spec = AgentConfig(target=solve, timeout_s=5.0)
    url = f"http://127.0.0.1:{run.port}"
    name = f"{part}.{os.getpid()}"
    if run.at(part).exists():  # the worker before this one is dead: its rollouts have ended
        await run.buffer().release(run.at(part).read_text())
    run.at(part).write_text(name)
    await RolloutWorker(buffer=run.buffer(), agent=spec, policy_url=url, model=MODEL, worker=name, concurrency=8).run()


def lag_of(version: int, group: Group) -> int:
    """How many updates old the oldest token of a group is."""
    return max((version - call.policy_version for t in group.trajectories for call in t.calls), default=0)


class TakenGroups(QuietObserver):
    """Writes down the groups of each step, and has a checkpoint written after each step."""

    def __init__(self, run: RunProcesses) -> None:
        super().__init__()
        self._run = run

    def checkpoint_folder(self, state: State, *, force: bool) -> Path | None:
        return checkpoint_folder(self._run.checkpoints, state.step)

    def record_rollouts(self, step: int, version: int, groups: Sequence[Group], logprobs: Any = None) -> None:
        with self._run.taken.open("a") as file:
            for group in groups:
                rollouts = [
                    {
                        "rollout": trajectory.key.rollout_id,
                        "attempt": trajectory.key.attempt,
                        "outcome": trajectory.outcome,
                        "calls": [call.call_id for call in trajectory.calls],
                    }
                    for trajectory in group.trajectories
                ]
                file.write(
                    json.dumps(
                        {"step": step, "group": group.group_id, "rollouts": rollouts, "lag": lag_of(version, group)}
                    )
                    + "\n"
                )


async def _driver(part: str, run: RunProcesses) -> None:
    run.checkpoints.mkdir(exist_ok=True)
    resumed = any(run.checkpoints.glob(f"step-*/{STATE_FILE}"))
    newest = newest_checkpoint(run.checkpoints) if resumed else None
    state = State(cursor=TaskCursor(seed=run.seed)) if newest is None else read_state(newest)
    board, buffer = PolicyBoard(heartbeat_timeout=3.0), run.buffer()
    learner: Any = Peer(run.at("learner"))
    await listen(run.at("board"), board)
    plan = Plan(
        steps=run.steps,
        algorithm=AlgorithmConfig(tasks_per_step=len(TASKS), rollouts_per_task=ROLLOUTS),
        loop=LoopConfig(max_lag=run.max_lag),
        rules=CreditRules(max_tokens=4096),
        pad_token=PAD,
        row_multiple=1,
    )
    loop = Loop(
        plan=plan,
        state=state,
        buffer=buffer,
        board=board,
        learner=learner,
        observer=TakenGroups(run),
        train_tasks=TASKS,
        val_tasks=TASKS,
    )
    while not run.at("learner").exists() or len(await board.versions()) < REPLICAS:
        await asyncio.sleep(0.02)
    if newest is not None:
        await buffer.resume(state.step, state.next_group, state.version if run.max_lag else None)
        await loop.restore(newest)
    run.ready.touch()
    state = await loop.run()
    stats = asdict(await buffer.stats())
    result = {
        "steps": state.step,
        "admitted": state.admitted,
        "trained": state.trained,
        "dropped": dict(state.dropped),
        "failed": dict(state.failed),
        "val_rewards": state.val_rewards,
        "stats": stats,
    }
    run.result.write_text(json.dumps(result))
