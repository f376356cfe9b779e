"""The Python API: what `agl` does, called from a script or a notebook.

    import agent_lightning as agl

    async def solve(task, policy): ...

    run = agl.train(agent=solve, reward=score, train=rows, val=held_out, model="Qwen/Qwen2.5-0.5B-Instruct", steps=20)
    run.metrics["train/reward"].plot()

Each call is a process of its own, as the command is: it starts and ends Ray, whatever runs in this process, and Ctrl-C
stops it in order. Functions travel by value, so they may be defined in a cell.
"""

from __future__ import annotations

import base64
import hashlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_lightning.core.errors import AgentLightningError, UserError
from agent_lightning.core.types import Policy
from agent_lightning.rollouts.agents import BY_VALUE
from agent_lightning.run.state import complete_checkpoints
from agent_lightning.run.tracking import RunDirectory

if TYPE_CHECKING:
    import pandas

Rows = str | Path | Iterable[Mapping[str, Any]]
"""Tasks: the path of a file, or rows (a list of dicts, a DataFrame, a data set of `datasets`)."""
MAX_TARGET = 120_000
"""Most characters of a function's pickle: Linux takes 131,071 of a word, and the key stands before it."""


class RunFailed(AgentLightningError):
    """A run ended without its result. The message is the line that the command printed."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run's folder. Example: Run(Path("runs/first")).rollouts.query("split == 'val'").reward.mean()"""

    path: Path

    @property
    def config(self) -> Mapping[str, Any]:
        """Every key of the run's config, as nested dicts."""
        import yaml

        values: Mapping[str, Any] = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        return values

    @property
    def summary(self) -> Mapping[str, Any]:
        """The run in numbers, how it ended and why; empty if it has not ended."""
        path = RunDirectory(self.path).summary
        values: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return values

    @property
    def metrics(self) -> pandas.DataFrame:
        """A row for each step, a column for each metric; of a step that was logged twice, the last values."""
        import pandas as pd

        from agent_lightning.cli.viewer.folder import RunFiles

        rows = pd.DataFrame(RunFiles(self.path).metrics())
        return rows.groupby("step").last() if len(rows) else rows

    @property
    def rollouts(self) -> pandas.DataFrame:
        """A row for each rollout, with its task, reward, outcome, calls and tools (docs/experiments.md)."""
        from agent_lightning.run.archive import read_rollouts

        return read_rollouts(self.path).to_pandas()

    @property
    def checkpoints(self) -> list[Path]:
        """The folders of the complete checkpoints, the newest last."""
        return complete_checkpoints(RunDirectory(self.path).checkpoints)

    def explain(self, rollout: str, *, tokens: bool = False) -> None:
        """Print what became of a rollout, as `agl explain` does. Raises UserError."""
        from agent_lightning.cli import inspect

        inspect.show_rollout(self.path, rollout, tokens=tokens)

    def export(self, out: str | Path, *, format: str = "jsonl") -> Path:
        """Write the rollouts as JSON lines, or as OTLP traces (`format="otlp"`), into a folder."""
        _run(["export", str(self.path), "--out", str(out), "--format", format])
        return Path(out)

    def export_model(
        self, out: str | Path, *, step: int | None = None, dtype: str | None = None, merged: bool = False
    ) -> Path:
        """Write the trained model in Hugging Face's format into a new folder: of the newest checkpoint, or of a step's.
        `dtype`: float32 or bfloat16. With LoRA it is the adapter alone, or if `merged` the model with it."""
        options = [*(["--checkpoint", str(step)] if step is not None else []), *(["--dtype", dtype] if dtype else [])]
        options += ["--merged"] if merged else []
        _run(["export", str(self.path), "--model", str(out), *options])
        return Path(out)

    def view(self, out: str | Path) -> Path:
        """Write the pages of `agl view` to one HTML file. In a notebook: IPython.display.IFrame(run.view("run.html"),
        900, 600)."""
        _run(["view", str(self.path), "--out", str(out)])
        return Path(out)


def train(
    agent: str | Callable[..., Any] | None = None,
    *,
    reward: str | Callable[..., Any] | None = None,
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
    with _words(agent, reward, {"train": train, "val": val}, model, keys) as words:
        path = resume.path if isinstance(resume, Run) else resume
        output = _run(["train", *words, *([f"resume={path}"] if path is not None else [])])
    return Run(_folder(output, "^run folder: (.+)$"))


def evaluate(
    agent: str | Callable[..., Any] | None = None,
    *,
    reward: str | Callable[..., Any] | None = None,
    tasks: Rows | None = None,
    model: str | None = None,
    **keys: Any,
) -> Mapping[str, Any]:
    """Run a model on all held-out tasks, without training, and return its figures, such as "reward" and "outcomes".
    Arguments and errors: see `train`."""
    with _words(agent, reward, {"val": tasks}, model, keys) as words, tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        _run(["eval", *words, "--out", str(out)])
        result: Mapping[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return result


def sweep(*, resume: str | Path | None = None, **keys: Any) -> Path:
    """Search the values of any keys, given as distributions, and return the sweep's folder.
    Example: sweep(experiment="calc_tiny", sweep="asha", **{"algorithm.lr": "loguniform(1e-4,3e-3)"})"""
    words = [*words_of(keys), *([f"resume={resume}"] if resume is not None else [])]
    return _folder(_run(["sweep", *words]), r"files in (\S+)")


@contextmanager
def serve(model: str | None = None, **keys: Any) -> Iterator[Policy]:
    """Serve a policy while the block runs. Yields where: `base_url`, `model` and `api_key` for any client.

    Example:

        with agl.serve(experiment="calc_tiny") as policy:
            client = openai.OpenAI(base_url=policy.base_url, api_key=policy.api_key)
    """
    with _words(None, None, {}, model, keys) as words, _process(["serve", *words]) as process:
        values: dict[str, str] = {}
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            if match := re.match(r"export (\w+)=(\S+)", line):
                values[match[1]] = match[2]
            elif values and not line.strip():
                break
        if "OPENAI_BASE_URL" not in values:
            raise _failure(process)
        yield Policy(
            version=0,
            base_url=values["OPENAI_BASE_URL"],
            model=values.get("AGL_MODEL", "policy"),
            api_key=values.get("OPENAI_API_KEY", "any"),
        )


def load_run(path: str | Path) -> Run:
    """Open the folder of a run, also of one that trains. Raises UserError if there is no run."""
    return Run(RunDirectory.open(Path(path)).path)


@contextmanager
def _words(
    agent: str | Callable[..., Any] | None,
    reward: str | Callable[..., Any] | None,
    rows: Mapping[str, Rows | None],
    model: str | None,
    keys: Mapping[str, Any],
) -> Iterator[list[str]]:
    """The words of a command line. Rows lie in a file beside the runs, as long as runs may read them: a resumed run
    does."""
    given = dict(keys)
    given |= {"agent.target": target(agent)} if agent is not None else {}
    if callable(agent) and not inspect.iscoroutinefunction(agent):
        given.setdefault("agent.mode", "thread")
    given |= {"agent.reward": target(reward)} if reward is not None else {}
    given |= {"model.path": model} if model is not None else {}
    for split, tasks in rows.items():
        if tasks is not None:
            path = (
                tasks if isinstance(tasks, str | Path) else write_rows(tasks, Path(str(keys.get("runs_dir", "runs"))))
            )
            source = dict.fromkeys(("target", "name", "split", "question_field", "result_field"))  # of an experiment
            source |= {"names": [], "kind": "jsonl", "path": str(path)}
            given |= {f"data.{split}.{key}": value for key, value in source.items()}
    yield words_of(given)


def target(function: str | Callable[..., Any]) -> str:
    """The name of a function for the config: its pickle, so that a worker on another machine has it by value. Raises
    UserError if it is larger than Linux lets a word of a command line be."""
    if isinstance(function, str):
        return function
    import cloudpickle

    name = BY_VALUE + base64.urlsafe_b64encode(cloudpickle.dumps(function)).decode().rstrip("=")
    if len(name) > MAX_TARGET:
        size = f"{len(name) // 1000:,} kB, more than {MAX_TARGET // 1000}"
        raise UserError(
            f"a function and the variables that it uses are {size}: read data and models within the function"
        )
    return name


def write_rows(rows: Iterable[Mapping[str, Any]], folder: Path) -> Path:
    """Write rows as JSON lines into a file whose name is that of their content; the same rows are written once."""
    records = rows.to_dict("records") if hasattr(rows, "to_dict") and hasattr(rows, "columns") else rows
    text = "".join(json.dumps(dict(row), ensure_ascii=False, default=str) + "\n" for row in records)
    path = folder / ".data" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path.resolve()


def words_of(keys: Mapping[str, Any], prefix: str = "") -> list[str]:
    """{"algorithm": {"lr": 1e-3}, "steps": 4} -> ["algorithm.lr=0.001", "steps=4"]"""
    words: list[str] = []
    for key, value in keys.items():
        if isinstance(value, Mapping):
            words += words_of(value, f"{prefix}{key}.")
        else:
            words.append(f"{prefix}{key}={_value(value)}")
    return words


def _value(value: Any) -> str:
    """A value as Hydra reads it. A text that is a word, or a distribution of a sweep, needs no quotes."""
    if isinstance(value, str):
        plain = re.fullmatch(r"[\w./:@%+-]+|\w+\([^'\"]*\)", value)
        return value if plain else "'" + re.sub(r"\\+(?='|$)", r"\g<0>\g<0>", value).replace("'", "\\'") + "'"
    if isinstance(value, Sequence):
        return f"[{','.join(map(_value, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _run(arguments: Sequence[str]) -> str:
    """Run a command to its end, with its output shown here; returns the output. Raises UserError or RunFailed."""
    with _process(arguments) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            sys.stdout.write(line)
            lines.append(line)
        process.wait()
        if process.returncode:
            raise _failure(process)
    return "".join(lines)


@contextmanager
def _process(arguments: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process of the command line, which is stopped in order when the block ends."""
    environment = {**os.environ, "COLUMNS": str(shutil.get_terminal_size((100, 40)).columns), "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", "agent_lightning", *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process:
            try:
                yield process
            except RunFailed:
                errors.seek(0)
                text = errors.read().strip()
                last = text.rpartition("\n")[2].removeprefix("agl: ") or f"it ended with exit code {process.returncode}"
                raise (UserError(last) if process.returncode == 2 else RunFailed(last)) from None
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)
                    process.wait()


def _failure(process: subprocess.Popen[str]) -> RunFailed:
    process.wait()
    return RunFailed("")


def _folder(output: str, pattern: str) -> Path:
    """The folder that a command names in its output. Raises RunFailed if it names none."""
    match = re.search(pattern, output, re.MULTILINE)
    if match is None:
        raise RunFailed("it named no folder")
    return Path(match[1].strip())
