"""The Python API: what `agl` does, called from a script or a notebook.

    import agent_lightning as agl

    async def solve(task, policy): ...

    run = agl.train(agent=solve, reward=score, train=rows, val=held_out, model="Qwen/Qwen2.5-0.5B-Instruct", steps=20)
    run.metrics["train/reward"].plot()

Each call is a process of its own, as the command is: it starts and ends Ray, whatever runs in this process, and Ctrl-C
stops it in order. Functions travel by value, so they may be defined in a cell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agent_lightning.api import process
from agent_lightning.api.runs import Run
from agent_lightning.api.words import Function, Rows, overrides
from agent_lightning.core.types import Policy


def train(
    agent: Function | None = None,
    *,
    reward: Function | None = None,
    train: Rows | None = None,
    val: Rows | None = None,
    model: str | None = None,
    resume: str | Path | Run | None = None,
    **keys: Any,
) -> Run:
    """Train a policy on the rollouts of an agent, and return the run. Any key of the config may be given: as nested
    dicts, or with dots by `**{"algorithm.lr": 1e-4}`; `experiment="calc_tiny"` begins with an experiment's settings.

    agent   a function of (task, policy), or what `agent.target` names
    reward  a function of (task, output); None if the agent returns the reward itself
    train, val   the tasks
    model   a folder, or the id of a model on the Hugging Face hub
    resume  a run that goes on

    Raises UserError for bad input, before anything starts, and RunFailed if the run fails.
    """
    words = overrides(agent, reward, {"train": train, "val": val}, model, keys)
    return Run(Path(process.run("train", words=words, resume=_place(resume))))


def sft(
    train: Rows | None = None,
    *,
    val: Rows | None = None,
    model: str | None = None,
    resume: str | Path | Run | None = None,
    **keys: Any,
) -> Run:
    """Train a policy on chats, as `agl sft` does, and return the run. Arguments and errors: see `train`.
    Example: warm = sft([{"messages": [...]}], model="Qwen/Qwen2.5-0.5B-Instruct", steps=100).export_model("warm")"""
    words = overrides(None, None, {"train": train, "val": val}, model, keys)
    return Run(Path(process.run("train", words=words, resume=_place(resume), supervised=True)))


def evaluate(
    agent: Function | None = None,
    *,
    reward: Function | None = None,
    tasks: Rows | None = None,
    model: str | None = None,
    **keys: Any,
) -> Mapping[str, Any]:
    """Run a model on all held-out tasks, without training, and return its figures, such as "reward" and "outcomes".
    Arguments and errors: see `train`."""
    figures: Mapping[str, Any] = process.run("evaluate", words=overrides(agent, reward, {"val": tasks}, model, keys))
    return figures


def sweep(*, resume: str | Path | None = None, **keys: Any) -> Path:
    """Search the values of any keys, given as distributions, and return the sweep's folder.
    Example: sweep(experiment="calc_tiny", sweep="asha", **{"algorithm.lr": "loguniform(1e-4,3e-3)"})"""
    words = overrides(None, None, {}, None, keys)
    return Path(process.run("sweep", words=words, resume=_place(resume)))


@contextmanager
def serve(model: str | None = None, **keys: Any) -> Iterator[Policy]:
    """Serve a policy while the block runs. Yields where: `base_url`, `model` and `api_key` for any client.

    Example:

        with agl.serve(experiment="calc_tiny") as policy:
            client = openai.OpenAI(base_url=policy.base_url, api_key=policy.api_key)
    """
    with process.started("serve", words=overrides(None, None, {}, model, keys)) as child:
        child.show_output(until=child.has_answered)
        yield Policy(version=0, **child.answer())


def _place(run: str | Path | Run | None) -> str | None:
    return None if run is None else str(run.path if isinstance(run, Run) else run)
