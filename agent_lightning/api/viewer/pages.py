"""The contents of the viewer's pages about a run: values for the templates, which say how they look."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode

import numpy as np

from agent_lightning.api.viewer.charts import Chart, Line, Link, line_chart, sparkline, stacked_chart
from agent_lightning.api.viewer.folder import Library, RunFiles, sweep_state
from agent_lightning.core.errors import DataError
from agent_lightning.core.metrics import Z95, interval
from agent_lightning.credit.tools import canonical_arguments
from agent_lightning.run.index import Filters, error_form

if TYPE_CHECKING:
    import pyarrow

PAGE_ROWS: Final = 50
"""Rollouts on a page of the list."""
PHASES: Final = ("generate", "update", "publish", "other")
LAG: Final = "lag/tokens/"
"""Metrics that count the trained tokens by how many updates older than the policy they are."""
Context = dict[str, Any]
"""The values that a template reads."""


class Links:
    """Addresses of the pages. A subclass for a file without a server gives "" for a page that is not in the file."""

    def home(self) -> str:
        return "/"

    def static(self, name: str) -> str:
        return f"/static/{name}"

    def run(self, run: str, page: str = "", /, **query: object) -> str:
        """The page of a run, or a page below it. Example: run("a", "rollouts", step=3) -> /run/a/rollouts?step=3"""
        words = {key: value for key, value in query.items() if value not in ("", None)}
        return f"/run/{run.replace('/', '~')}{'/' if page else ''}{page}{'?' if words else ''}{urlencode(words)}"

    def sweep(self, name: str) -> str:
        return f"/sweep/{name}"

    def rollout(self, run: str, rollout_id: str) -> str:
        return self.run(run, f"rollout/{rollout_id}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """A run in the list of runs."""

    name: str
    measure: str
    """What the run improves: reward, or loss in supervised training."""
    experiment: str
    state: str
    reason: str
    steps: int
    of_steps: int
    first: float
    last: float
    half_width: float
    """Half the width of the 95 % interval of `last`."""
    failed: float
    """Share of the training rollouts that failed."""
    spark: str
    """The points of its sparkline."""


def run_row(name: str, run: RunFiles) -> RunRow:
    """Read what the list of runs shows of a run: small files only."""
    config, (state, reason) = run.config(), run.state()
    measure = "loss" if run.series("train/loss") else "reward"
    held_out, train = run.series(f"val/{measure}"), run.series(f"train/{measure}")
    rows = dict(run.series("val/rows"))
    step, last = held_out[-1] if held_out else (0.0, math.nan)
    # Earlier versions wrote no interval: a reward in [0, 1] has at most the variance p (1 - p).
    count = rows.get(step, 0.0)
    variance = last * (1 - last) if 0 <= last <= 1 and measure == "reward" else math.nan
    widest = Z95 * math.sqrt(variance / count) if count else math.nan
    failed = sum(value for row in run.metrics() for key, value in row.items() if key.startswith("rollouts/failed/"))
    ended = failed + sum(value for _, value in run.series("rollouts/trained"))
    ended += sum(value for row in run.metrics() for key, value in row.items() if key.startswith("rollouts/dropped/"))
    return RunRow(
        name=name,
        measure=measure,
        experiment=str(config.get("experiment", "")),
        state=state,
        reason=reason,
        steps=int(max((row["step"] for row in run.metrics()), default=0)),
        of_steps=int(config.get("steps") or 0),
        first=held_out[0][1] if held_out else math.nan,
        last=last,
        half_width=dict(run.series("val/reward_ci95")).get(step, widest),
        failed=failed / ended if ended else math.nan,
        spark=sparkline([value for _, value in (held_out if len(held_out) > 2 else train)]),
    )


def runs_page(library: Library) -> Context:
    rows = [run_row(name, library.run(name)) for name in library.names()]
    sweeps = [(name, *sweep_state(library.sweep(name))) for name in library.sweeps()]
    return {"rows": [row for row in rows if "/" not in row.name], "sweeps": sweeps, "root": library.root}


def compare_page(library: Library, names: Sequence[str]) -> Context:
    """Curves of several runs over each other, and the keys of their configs that differ. Raises DataError."""
    runs = {name: library.run(name) for name in names}
    charts = [
        line_chart(title, [Line(name=name, points=run.series(key), dots=dots) for name, run in runs.items()])
        for title, key, dots in (
            ("Held-out reward", "val/reward", True),
            ("Training reward", "train/reward", False),
            ("Held-out loss, nats a token", "val/loss", True),
            ("Sampled tokens a rollout", "rollout/response_tokens", False),
            ("Seconds a step", "time/step", False),
            ("Entropy, nats", "learner/entropy", False),
            ("KL to the reference, nats", "learner/kl_to_reference", False),
        )
    ]
    configs = {name: flatten(run.config()) for name, run in runs.items()}
    keys = dict.fromkeys(key for config in configs.values() for key in config)
    differing = [key for key in keys if len({config.get(key, "–") for config in configs.values()}) > 1]
    return {
        "charts": [chart for chart in charts if chart],
        "names": names,
        "rows": [run_row(name, run) for name, run in runs.items()],
        "diff": [(key, [config.get(key, "–") for config in configs.values()]) for key in differing],
    }


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} -> {"a.b": "1"}"""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def run_page(name: str, run: RunFiles, links: Links) -> Context:
    """The charts of a run, and its config."""

    def train(step: int) -> str:
        return links.run(name, "rollouts", split="train", step=step)

    def held_out(step: int) -> str:
        return links.run(name, "rollouts", split="val", step=step)

    def curves(title: str, unit: str, keys: Mapping[str, str], log: bool = False) -> Chart | None:
        lines = [Line(name=text, points=run.series(key)) for key, text in keys.items()]
        return line_chart(title, lines, link=train, unit=unit, log=log)

    def rewards(split: str, title: str, link: Link) -> Chart | None:
        by_step, points = rewards_by_step(table, split), run.series(f"{split}/reward")
        widths = [interval(by_step.get(int(step), ()))[1] for step, _ in points]
        line = Line(name="reward", points=points, half_widths=widths, dots=split == "val")
        return line_chart(title, [line], link=link)

    table = run.index.table()
    outcomes: defaultdict[str, Counter[float]] = defaultdict(Counter)
    columns = (table.column(name).to_pylist() for name in ("split", "step", "outcome"))
    for split, step, outcome in zip(*columns, strict=True):
        if split == "train":
            outcomes[outcome][step] += 1
    ordered = {name: outcomes[name] for name in sorted(outcomes, key=lambda name: (name != "finished", name))}
    parts = {key for row in run.metrics() for key in row if key.startswith(("emitted/", "reward/", "air/"))}
    lags = sorted({int(key[len(LAG) :]) for row in run.metrics() for key in row if key.startswith(LAG)})
    spent = dict(run.series("time/step"))
    rates = [(step, count / spent[step]) for step, count in run.series("tokens/sampled") if spent.get(step)]
    return {
        "row": run_row(name, run),
        "curves": curves,
        "rewards": rewards,
        "train": train,
        "held_out": held_out,
        "parts": {key: key for key in sorted(parts)[:8]},
        "outcomes": stacked_chart("Outcomes of the rollouts", ordered, link=train, unit="rollouts"),
        "lags": stacked_chart(
            *("Trained tokens by their lag", {f"{lag}": dict(run.series(f"{LAG}{lag}")) for lag in lags}),
            link=train,
            unit="tokens",
        ),
        "phases": stacked_chart(
            *("Seconds of a step, by phase", {phase: dict(run.series(f"time/{phase}")) for phase in PHASES}),
            link=train,
            unit="s",
        ),
        "rates": line_chart("Sampled tokens a second", [Line(name="tokens/s", points=rates)], link=train),
        "config": sorted(flatten(run.config()).items()),
        "rollouts": len(table),
        "failed": sum(outcome != "finished" for outcome in table.column("outcome").to_pylist()),
        "damaged": run.index.damaged,
        "errors": error_groups(table)[:8],
        "summary": run.summary(),
    }


def rewards_by_step(table: pyarrow.Table, split: str) -> dict[int, list[float]]:
    """The mean reward of each of a step's groups: rollouts of a task are not independent. A rollout without a reward
    counts as 0."""
    rewards: defaultdict[int, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    columns = (table.column(name).to_pylist() for name in ("split", "step", "group_id", "reward"))
    for kind, step, group_id, reward in zip(*columns, strict=True):
        if kind == split:
            rewards[step][group_id].append(reward or 0.0)
    return {step: [sum(group) / len(group) for group in groups.values()] for step, groups in rewards.items()}


def error_groups(table: pyarrow.Table) -> list[tuple[str, int]]:
    """The forms of the errors, and how many rollouts have each; the most frequent first."""
    forms = Counter(error_form(error) for error in table.column("error").to_pylist() if error)
    return forms.most_common()


def rollouts_page(name: str, run: RunFiles, links: Links, filters: Filters, page: int) -> Context:
    """A page of the rollouts that fit, the groups with the widest spread of rewards first."""
    table = run.index.select(filters)
    order, spread = sorted_rows(table, filters.sort)
    pages = max(1, math.ceil(len(order) / PAGE_ROWS))
    page = min(max(1, page), pages)
    shown = order[(page - 1) * PAGE_ROWS : page * PAGE_ROWS]
    chosen = table.take(np.array(shown, np.int64))
    texts = run.index.columns(chosen, ["output"])
    rows = [
        row
        | {"spread": float(spread[index]), "reward": math.nan if row["reward"] is None else row["reward"]}
        | {"text": row["error"] or texts.get(row["rollout_id"], {}).get("output") or ""}
        for index, row in zip(shown, chosen.to_pylist(), strict=True)
    ]
    every = run.index.table()
    query = {key: getattr(filters, key) for key in filters.__slots__}

    def with_filters(**changes: object) -> str:
        return links.run(name, "rollouts", **{**query, **changes})

    outcomes = Counter(table.column("outcome").to_pylist())
    return {
        "rows": rows,
        "total": len(order),
        "every": len(every),
        "page": page,
        "pages": pages,
        "filters": filters,
        "with_filters": with_filters,
        "errors": error_groups(table)[:10],
        "outcomes": outcomes.most_common(),
        "choices": {
            "split": sorted(set(every.column("split").to_pylist())),
            "outcome": sorted(set(every.column("outcome").to_pylist())),
            "status": ["ok", "error", "invalid_arguments", "timeout", "empty", "unanswered"],
        },
    }


def sorted_rows(table: pyarrow.Table, sort: str) -> tuple[list[int], Sequence[float]]:
    """The rows of an index table in the order of a page, and the spread of each row's group."""
    count = len(table)
    reward_R = np.array([math.nan if r is None else r for r in table.column("reward").to_pylist()], np.float64)
    _, group_R = np.unique(np.array(table.column("group_id").to_pylist() or [""]), return_inverse=True)
    group_R = group_R[:count]
    high_G, low_G = np.full(count + 1, -np.inf), np.full(count + 1, np.inf)
    known_R = np.isfinite(reward_R)
    np.maximum.at(high_G, group_R[known_R], reward_R[known_R])
    np.minimum.at(low_G, group_R[known_R], reward_R[known_R])
    spread_R = np.maximum(0.0, np.nan_to_num((high_G - low_G)[group_R], neginf=0.0))
    row_R = np.array(table.column("row").to_pylist(), np.int64)
    step_R = np.array(table.column("step").to_pylist(), np.int64)
    reward_last = np.nan_to_num(reward_R, nan=-np.inf)
    keys: Mapping[str, tuple[Any, ...]] = {
        "spread": (row_R, group_R, -step_R, -spread_R),
        "reward": (row_R, reward_last),
        "-reward": (row_R, -reward_last),
        "newest": (-row_R,),
        "calls": (row_R, -np.array(table.column("num_calls").to_pylist(), np.int64)),
    }
    return np.lexsort(keys.get(sort, keys["spread"])).tolist(), spread_R


def tools_page(run: RunFiles, link: Link) -> Context:
    """Each tool: calls, statuses, repeats, seconds; and its calls by step."""
    statuses: defaultdict[str, Counter[str]] = defaultdict(Counter)
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    by_step: defaultdict[str, Counter[float]] = defaultdict(Counter)
    failed: defaultdict[str, Counter[float]] = defaultdict(Counter)
    arguments: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for step, name, status, spent, words in run.index.tools():
        statuses[name][status] += 1
        seconds[name].append(spent)
        by_step[name][step] += 1
        arguments[name][canonical_arguments(words)[:200]] += 1
        if status != "ok":
            failed[name][step] += 1
    shares = [
        Line(name=name, points=[(step, failed[name][step] / calls) for step, calls in sorted(by_step[name].items())])
        for name in sorted(by_step)
    ]
    rows = []
    for name in sorted(statuses, key=lambda name: -statuses[name].total()):
        times = sorted(seconds[name])
        rows.append(
            {
                "name": name,
                "calls": statuses[name].total(),
                "statuses": statuses[name].most_common(),
                "p50": times[len(times) // 2],
                "p95": times[min(len(times) - 1, int(0.95 * len(times)))],
                "frequent": arguments[name].most_common(3),
            }
        )
    charts = [
        stacked_chart("Tool calls", by_step, link=link, unit="calls"),
        line_chart("Share of calls that failed", shares, link=link),
    ]
    return {"rows": rows, "charts": [chart for chart in charts if chart]}


def task_page(run: RunFiles, task_id: str, split: str) -> Context:
    """The rollouts of a task at each step at which it ran. Raises DataError if there are none."""
    table = run.index.select(replace(Filters(), task=task_id, split=split))
    if not len(table):
        raise DataError(f"{run.name} has no rollout of the task {task_id}")
    texts = run.index.columns(table, ["output", "task"])
    rows = sorted(table.to_pylist(), key=lambda row: (row["step"], row["rollout_id"]))
    steps: dict[int, list[Context]] = {}
    for row in rows:
        steps.setdefault(row["step"], []).append(row | {"output": texts[row["rollout_id"]]["output"] or ""})
    mean = [(step, math.fsum(row["reward"] or 0.0 for row in at) / len(at)) for step, at in steps.items()]
    task = next(iter(texts.values()))["task"]
    chart = line_chart("Reward of this task", [Line(name="reward", points=mean, dots=True)])
    return {"steps": steps, "task": task, "task_id": task_id, "chart": chart, "split": split}


def tasks_of(table: pyarrow.Table) -> list[tuple[str, float, float, int]]:
    """The held-out tasks: id, first and last reward, number of evaluations; those whose reward changed most first."""
    rewards: defaultdict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    columns = (table.column(name).to_pylist() for name in ("split", "task_id", "step", "reward"))
    for split, task, step, reward in zip(*columns, strict=True):
        if split == "val":
            rewards[task][step].append(reward or 0.0)

    def mean(values: Iterable[float]) -> float:
        known = list(values)
        return math.fsum(known) / len(known)

    rows = [(task, mean(at[min(at)]), mean(at[max(at)]), len(at)) for task, at in rewards.items()]
    return sorted(rows, key=lambda row: (-abs(row[2] - row[1]), row[0]))
