"""A sweep before and after its trials: its settings, what a command line asks for, its folder, and its outcome.

runs/sweep-calc_tiny-20260101-120000/
  sweep.yaml       what was asked for; `agl sweep resume=` reads it
  trial-000/ …     each an ordinary run
  logs/            what each trial said on its terminal
  trials.jsonl     a line for each trial: its words, how it ended, its held-out rewards
  experiment/best.yaml, curves.png, parallel.png
"""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from agent_lightning.config.load import Config, load, one_line, project_folder
from agent_lightning.core.errors import ConfigError, UserError
from agent_lightning.sweeps.comparisons import Axis, Curve, plot_curves, plot_parallel
from agent_lightning.sweeps.space import Between, Choice, Distribution, parse_words, sampled_words

SEARCHES = ("random", "grid", "bayes")
SCHEDULERS = ("none", "asha", "pbt")
MAX_GRID = 256
OWN_KEYS = ("name", "runs_dir")
"""Of the trials; the sweep itself sets them."""


@dataclass(slots=True, kw_only=True)
class SweepConfig:
    """`sweep=NAME` takes one from conf/sweep, `sweep.KEY=VALUE` changes it."""

    search: str = "random"
    """random, grid, or bayes."""
    scheduler: str = "none"
    """none, asha, or pbt."""
    trials: int | None = None
    """null: 16; a grid has as many as it has."""
    concurrent: int | None = None
    """Trials at a time; null: as many as the cluster has room for."""
    seed: int = 0
    """Of the draws; a trial's own seed is the key `seed`."""
    grace_steps: int | None = None
    """asha: steps before a trial may be stopped; null: eval_every."""
    reduction: float = 4.0
    """asha: of the trials that come to a rung, one in this many goes on; the next rung is this many times as far."""
    interval_steps: int | None = None
    """pbt: steps between comparisons; null: eval_every."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """What a sweep does, complete and checked."""

    experiment: str
    command: tuple[str, ...]
    """As it was asked for."""
    settings: SweepConfig
    fixed: tuple[str, ...]
    """What every trial's command line says."""
    space: Mapping[str, Distribution]
    steps: int
    eval_every: int

    @property
    def num_trials(self) -> int:
        if self.settings.search == "grid":
            return math.prod(len(one.values) for one in self.space.values() if isinstance(one, Choice))
        return self.settings.trials or 16

    def words(self, values: Mapping[str, object]) -> tuple[str, ...]:
        """The command line of the trial with these values, but for its name and folder."""
        return (*self.fixed, *sampled_words(self.space, values))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """What became of a trial."""

    name: str
    words: tuple[str, ...]
    """Of the searched keys."""
    state: str = "running"
    """running, done, stopped (by the scheduler), or failed."""
    run: str | None = None
    """Its folder: of PBT, the newest."""
    rewards: tuple[tuple[int, float], ...] = ()
    """(step, held-out reward) of each evaluation."""
    error: str | None = None
    seconds: float = 0.0

    @property
    def ended(self) -> bool:
        return self.state in ("done", "stopped", "failed")

    @property
    def last(self) -> float:
        return self.rewards[-1][1] if self.rewards else math.nan

    @property
    def step(self) -> int:
        return self.rewards[-1][0] if self.rewards else 0


def hydra_words(words: Sequence[str]) -> list[str]:
    """Hydra's own sweeps as ours: algorithm.lr=1e-4,3e-4 -> algorithm.lr=choice(1e-4,3e-4), and every combination,
    where no `sweep=` says otherwise. Raises ConfigError."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    plain = []
    for word in words:
        try:
            (override,) = OverridesParser.create().parse_overrides([word])
            values = ",".join(override.sweep_string_iterator()) if override.is_sweep_override() else None
        except HydraException as error:
            raise ConfigError(f"{word}: {one_line(error)}") from error
        plain.append(word if values is None else f"{override.get_key_element()}=choice({values})")
    return plain if any(word.startswith("sweep=") for word in words) else [*plain, "sweep=grid"]


def plan_sweep(words: Sequence[str]) -> tuple[SweepPlan, Config]:
    """Read and check a command line, and give its first trial's config. Raises ConfigError, before anything starts.

    Every end of every distribution is composed into a whole config, so an unknown key, a wrong type and a value out
    of its bounds are refused as `agl train` would refuse them.
    """
    fixed, space = parse_words(words)
    settings = _settings([word for word in fixed if word.partition("=")[0].split(".")[0] == "sweep"])
    fixed = tuple(word for word in fixed if word.partition("=")[0].split(".")[0] != "sweep")
    for key in OWN_KEYS:
        if key in space or any(word.startswith(f"{key}=") for word in fixed if key == "name"):
            raise ConfigError(f"{key}: a sweep names and places its trials itself; leave it out")
    if not space:
        raise ConfigError("a sweep needs something to search, such as 'algorithm.lr=loguniform(1e-4,3e-3)'")
    if settings.search == "grid":
        _check_grid(settings, space)
    middle = {key: one.ends()[0] for key, one in space.items()}
    first = _compose(fixed, middle)
    for key, one in space.items():
        for value in one.ends()[1:]:
            _compose(fixed, middle | {key: value})
    plan = SweepPlan(
        experiment=first.experiment,
        command=tuple(words),
        settings=settings,
        fixed=fixed,
        space=space,
        steps=first.steps,
        eval_every=first.eval_every or first.steps,
    )
    _check(plan)
    return plan, first


def _compose(fixed: Sequence[str], values: Mapping[str, str]) -> Config:
    return load([*fixed, *(f"{key}={value}" for key, value in values.items())])


def _settings(words: Sequence[str]) -> SweepConfig:
    """conf/sweep/NAME.yaml with `sweep.KEY=VALUE` on top. Raises ConfigError."""
    folder = project_folder("conf") / "sweep"
    chosen = [word.removeprefix("sweep=") for word in words if word.startswith("sweep=")] or ["random"]
    file = folder / f"{chosen[-1]}.yaml"
    if not file.is_file():
        names = ", ".join(sorted(one.stem for one in folder.glob("*.yaml")))
        raise ConfigError(f"sweep={chosen[-1]}: unknown; choose one of {names}")
    dotted = [word.removeprefix("sweep.") for word in words if word.startswith("sweep.")]
    known = [one.name for one in fields(SweepConfig)]
    if unknown := [key for word in dotted if (key := word.partition("=")[0]) not in known]:
        raise ConfigError(f"sweep.{unknown[0]}: no such key; there are {', '.join(known)}")
    try:
        node = OmegaConf.merge(OmegaConf.structured(SweepConfig), OmegaConf.load(file), OmegaConf.from_dotlist(dotted))
        settings = OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise ConfigError(f"sweep.{one_line(error)}") from error
    assert isinstance(settings, SweepConfig)
    return settings


def _check_grid(settings: SweepConfig, space: Mapping[str, Distribution]) -> None:
    """Raises ConfigError for what cannot be tried in all combinations."""
    if settings.trials is not None:
        raise ConfigError("sweep.trials: a grid has as many trials as it has combinations; leave it out")
    values = {key: one.values for key, one in space.items() if isinstance(one, Choice)}
    if endless := [key for key in space if key not in values]:
        raise ConfigError(f"{endless[0]}: a grid needs choice(…) or range(…); or choose another sweep")
    if (combinations := math.prod(map(len, values.values()))) > MAX_GRID:
        raise ConfigError(f"the grid has {combinations} combinations, more than {MAX_GRID}: use sweep=random")


def _check(plan: SweepPlan) -> None:
    """Values that cannot be, that contradict each other, or that nothing reads. Raises ConfigError."""
    settings, default = plan.settings, SweepConfig()
    if settings.search not in SEARCHES:
        raise ConfigError(f"sweep.search={settings.search}: must be one of {', '.join(SEARCHES)}")
    if settings.scheduler not in SCHEDULERS:
        raise ConfigError(f"sweep.scheduler={settings.scheduler}: must be one of {', '.join(SCHEDULERS)}")
    for key, value in (("trials", settings.trials), ("concurrent", settings.concurrent)):
        if value is not None and value < 1:
            raise ConfigError(f"sweep.{key}={value}: must be at least 1")
    for scheduler, key in (("asha", "grace_steps"), ("asha", "reduction"), ("pbt", "interval_steps")):
        value = getattr(settings, key)
        if value != getattr(default, key) and settings.scheduler != scheduler:
            raise ConfigError(f"sweep.{key}={value}: only sweep.scheduler={scheduler} reads it")
        if key != "reduction" and value is not None and not 1 <= value <= plan.steps:
            raise ConfigError(f"sweep.{key}={value}: must be from 1 to steps={plan.steps}")
    if settings.reduction <= 1:
        raise ConfigError(f"sweep.reduction={settings.reduction}: must be above 1")
    if settings.scheduler != "none":
        if {"steps", "eval_every"} & set(plan.space):
            raise ConfigError("steps and eval_every cannot be searched where trials are compared on their way")
        if plan.eval_every >= plan.steps:
            raise ConfigError(f"eval_every: {settings.scheduler} compares trials on their way; set it below steps")
    if settings.scheduler == "pbt":
        if settings.search != "random":
            raise ConfigError("sweep.scheduler=pbt draws its own values: it goes with sweep.search=random only")
        if plan.num_trials < 2:
            raise ConfigError("sweep.trials: a population has at least 2")


def trial_words(plan: SweepPlan, group: str) -> tuple[str, ...]:
    """What the sweep adds to every trial: one group in Weights & Biases, and the checkpoints that PBT copies."""
    given = {word.partition("=")[0] for word in plan.fixed}
    added = () if "tracking.group" in given else (f"tracking.group={group}",)
    if plan.settings.scheduler != "pbt":
        return added
    return (*added, f"checkpoint_every={plan.settings.interval_steps or plan.eval_every}")


class SweepFolder:
    """Where a sweep and its trials lie."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, root: Path, plan: SweepPlan) -> SweepFolder:
        """Raises UserError where `root` cannot be written."""
        stem = f"sweep-{plan.experiment}-{time.strftime('%Y%m%d-%H%M%S')}"
        number = 1
        while (path := root / (stem if number == 1 else f"{stem}-{number}")).exists():
            number += 1
        try:
            (path / "logs").mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot make a folder in {root}: {error.strerror}") from error
        folder = cls(path)
        folder.asked.write_text(yaml.safe_dump({"command": list(plan.command)}, sort_keys=False, allow_unicode=True))
        return folder

    @classmethod
    def open(cls, path: Path) -> SweepFolder:
        """Raises UserError where `path` is no sweep."""
        folder = cls(path)
        if not folder.asked.is_file():
            raise UserError(f"{path} is no sweep: it has no {folder.asked.name}")
        return folder

    @property
    def asked(self) -> Path:
        return self.path / "sweep.yaml"

    @property
    def trials(self) -> Path:
        return self.path / "trials.jsonl"

    @property
    def best(self) -> Path:
        return self.path / "experiment" / "best.yaml"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def parallel(self) -> Path:
        return self.path / "parallel.png"

    def command(self) -> list[str]:
        return [str(word) for word in yaml.safe_load(self.asked.read_text())["command"]]

    def write(self, records: Sequence[TrialRecord]) -> None:
        """A line for each trial; the file appears whole or not at all."""
        unfinished = self.trials.with_name(f".{self.trials.name}.tmp")
        unfinished.write_text("".join(json.dumps(asdict(one)) + "\n" for one in records))
        unfinished.replace(self.trials)

    def read(self) -> list[TrialRecord]:
        if not self.trials.is_file():
            return []
        rows = [json.loads(line) for line in self.trials.read_text().splitlines()]
        return [
            TrialRecord(**row | {"words": tuple(row["words"]), "rewards": tuple((s, r) for s, r in row["rewards"])})
            for row in rows
        ]


def best_of(records: Sequence[TrialRecord]) -> TrialRecord | None:
    """The trial with the highest last held-out reward, of equal ones the one that came furthest; never a failed one.

    The highest of many noisy figures is too high by some of the noise: the winner's fair figure is that of new runs.
    """
    known = [one for one in records if one.state in ("done", "stopped") and math.isfinite(one.last)]
    return max(known, key=lambda one: (one.last, one.step), default=None)


def finish_sweep(plan: SweepPlan, folder: SweepFolder, records: Sequence[TrialRecord]) -> TrialRecord | None:
    """Write the winner as an experiment file, and the two pictures; None where no trial was evaluated."""
    best = best_of(records)
    if best is None:
        return None
    folder.best.parent.mkdir(exist_ok=True)
    folder.best.write_text(best_experiment(plan, best))
    title = f"{plan.experiment}: {len(records)} trials"
    curves = [Curve(f"{one.name} {one.last:.3f}", one.rewards, one is best) for one in records]
    plot_curves(curves, folder.curves, title)
    values = [dict(word.partition("=")[::2] for word in one.words) for one in records]
    axes = [_axis(key, one, [value[key] for value in values]) for key, one in plan.space.items()]
    plot_parallel(axes, [one.last for one in records], records.index(best), folder.parallel, title)
    return best


def _axis(key: str, one: Distribution, values: list[str]) -> Axis:
    words = one.values if isinstance(one, Choice) else None
    return Axis(key, values, words, log=isinstance(one, Between) and one.log)


def best_experiment(plan: SweepPlan, best: TrialRecord) -> str:
    """The winner as an experiment file: what it says beyond the experiment that was swept.

    Example: experiment=calc_tiny, steps=8, credit=air, algorithm.lr=0.001 ->
        defaults: [calc_tiny, override /credit: air, _self_]
        steps: 8
        algorithm: {lr: 0.001}
    """
    conf = project_folder("conf")
    pairs = [word.partition("=")[::2] for word in (*plan.fixed, *best.words)]
    groups = {key: value for key, value in pairs if (conf / key).is_dir() and key != "experiment"}
    values = [f"{key}={value}" for key, value in pairs if not (conf / key).is_dir() and key not in _NOT_IN_BEST]
    defaults: list[Any] = [Path(dict(pairs)["experiment"]).stem]
    defaults += [{f"override /{key}": value} for key, value in groups.items()]
    title = (
        f"# The best of {plan.num_trials} trials: held-out reward {best.last:.3f} at step {best.step} ({best.run}).\n"
    )
    asked = "# agl sweep " + shlex.join(plan.command) + "\n"
    body = {"defaults": [*defaults, "_self_"]}
    return f"# @package _global_\n{title}{asked}" + OmegaConf.to_yaml(
        OmegaConf.merge(body, {"experiment": f"{plan.experiment}_best"}, OmegaConf.from_dotlist(values))
    )


_NOT_IN_BEST = ("runs_dir", "tracking.group", "checkpoint_every", "experiment")
"""Of the sweep, not of what won it."""
