"""The arguments of a Python call as overrides of the config: keys, functions by value, and rows in a file."""

from __future__ import annotations

import base64
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agent_lightning.rollouts.agents import BY_VALUE

Function = str | Callable[..., Any]
"""A function, or what `agent.target` names: a module or a file, and a name in it."""
Rows = str | Path | Iterable[Mapping[str, Any]]
"""Tasks: the path of a file, or rows (a list of dicts, a DataFrame, a data set of `datasets`)."""


def overrides(
    agent: Function | None,
    reward: Function | None,
    rows: Mapping[str, Rows | None],
    model: str | None,
    keys: Mapping[str, Any],
) -> list[str]:
    """The overrides of a call. Rows are written to a file beside the runs: a resumed run reads them again."""
    given = dict(keys)
    given |= {"agent.target": target(agent)} if agent is not None else {}
    if callable(agent) and not inspect.iscoroutinefunction(agent):
        given.setdefault("agent.mode", "thread")
    given |= {"agent.reward": target(reward)} if reward is not None else {}
    given |= {"model.path": model} if model is not None else {}
    for split, tasks in rows.items():
        if tasks is not None:
            folder = Path(str(keys.get("runs_dir", "runs")))
            path = tasks if isinstance(tasks, str | Path) else write_rows(tasks, folder)
            source = dict.fromkeys(("target", "name", "split", "question_field", "result_field"))  # of an experiment
            source |= {"names": [], "kind": "jsonl", "path": str(path)}
            given |= {f"data.{split}.{key}": value for key, value in source.items()}
    return words_of(given)


def target(function: Function) -> str:
    """The name of a function for the config: its pickle, so that a worker on another machine has it by value."""
    if isinstance(function, str):
        return function
    import cloudpickle

    return BY_VALUE + base64.urlsafe_b64encode(cloudpickle.dumps(function)).decode().rstrip("=")


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
