"""The plan of a sweep: its settings and its checked command line; and its folder, with the records of its trials."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError

from agent_lightning.config.load import Config, explain, load, one_line, project_folder, rename_keys
from agent_lightning.config.section import AtLeast1, Section
from agent_lightning.core import files
from agent_lightning.core.errors import ConfigError, UserError
from agent_lightning.launch.sweeps.space import Choice, Distribution, parse_words, sampled_words
from agent_lightning.run.tracking import new_folder

MAX_GRID = 256


class SweepConfig(Section):
    """The settings of a sweep: `sweep=NAME` loads conf/sweep/NAME.yaml, and `sweep.KEY=VALUE` changes a setting."""

    search: Literal["random", "grid", "bayes"] = "random"
    scheduler: Literal["none", "asha", "pbt"] = "none"
    trials: AtLeast1 | None = None
    """The number of trials; null: 16. A grid has a trial for each combination."""
    concurrent: AtLeast1 | None = None
    """Trials that run at the same time; null: as many as the cluster has room for."""
    seed: int = 0
    """The seed of the draws from the search space; a trial's own seed is the key `seed`."""
    grace_steps: AtLeast1 | None = None
    """asha: steps before a trial may be stopped; null: eval_every."""
    reduction: Annotated[float, Field(gt=1)] = 4.0
    """asha: the share 1/reduction of the trials at a rung continues, to the next rung at reduction times the steps."""
    interval_steps: AtLeast1 | None = None
    """pbt: steps between comparisons; null: eval_every."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """The checked plan of a sweep."""

    experiment: str
    command: tuple[str, ...]
    """The command line, as it was typed."""
    settings: SweepConfig
    fixed: tuple[str, ...]
    """The words that the command lines of all trials share."""
    space: Mapping[str, Distribution]
    steps: int
    interval: int
    """Steps between the evaluations of a trial."""

    @property
    def num_trials(self) -> int:
        if self.settings.search == "grid":
            return math.prod(len(choice.values) for choice in self.space.values() if isinstance(choice, Choice))
        return self.settings.trials or 16

    def words(self, values: Mapping[str, object]) -> tuple[str, ...]:
        """The command line of the trial with these values, without its name and folder."""
        return (*self.fixed, *sampled_words(self.space, values))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """The state of a trial and its results so far."""

    name: str
    words: tuple[str, ...]
    """The words of its command line for the searched keys."""
    state: str = "running"
    """running, done, stopped (by the scheduler), or failed."""
    run: str | None = None
    """The name of its run's folder. Under PBT a trial may have several runs; this is the newest."""
    rewards: tuple[tuple[int, float], ...] = ()
    """(step, held-out reward) of each evaluation."""
    error: str | None = None
    seconds: float = 0.0

    @property
    def ended(self) -> bool:
        return self.state != "running"

    @property
    def last(self) -> float:
        """The held-out reward of the last evaluation; NaN before the first."""
        return self.rewards[-1][1] if self.rewards else math.nan

    @property
    def step(self) -> int:
        """The step of the last evaluation."""
        return self.rewards[-1][0] if self.rewards else 0


def hydra_words(words: Sequence[str]) -> list[str]:
    """Translate Hydra's own sweeps: algorithm.lr=1e-4,3e-4 -> algorithm.lr=choice(1e-4,3e-4). Raises ConfigError.
    The result is a grid unless a word begins with `sweep=`."""
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
    """Read and check a command line; returns the plan and a config of the sweep. Raises ConfigError. The config is
    composed with both bounds, or every choice, of each searched key, so that unknown keys, wrong types and values out
    of bounds are refused with the messages of `agl train`, before anything starts."""
    parsed, space = parse_words(words)
    own = [word for word in parsed if word.partition("=")[0].partition(".")[0] == "sweep"]
    settings, fixed = _settings(own), tuple(word for word in parsed if word not in own)
    for key in ("name", "runs_dir"):
        if key in space or (key == "name" and any(word.startswith("name=") for word in fixed)):
            raise ConfigError(f"{key}: a sweep names and places its trials itself; leave it out")
    if not space:
        raise ConfigError("a sweep needs something to search, such as 'algorithm.lr=loguniform(1e-4,3e-3)'")
    first = {key: distribution.check_values()[0] for key, distribution in space.items()}
    others = [first | {key: value} for key, distribution in space.items() for value in distribution.check_values()[1:]]
    config, *_ = [load([*fixed, *(f"{key}={value}" for key, value in values.items())]) for values in (first, *others)]
    plan = SweepPlan(
        experiment=config.experiment,
        command=tuple(words),
        settings=settings,
        fixed=fixed,
        space=space,
        steps=config.steps,
        interval=config.evaluation_interval,
    )
    _check_settings(plan)
    return plan, config


def _settings(words: Sequence[str]) -> SweepConfig:
    """Load conf/sweep/NAME.yaml and apply `sweep.KEY=VALUE`. Raises ConfigError."""
    folder = project_folder("conf") / "sweep"
    *_, chosen = ["random", *(word.removeprefix("sweep=") for word in words if word.startswith("sweep="))]
    if not (file := folder / f"{chosen}.yaml").is_file():
        names = ", ".join(sorted(preset.stem for preset in folder.glob("*.yaml")))
        raise ConfigError(f"sweep={chosen}: unknown; choose one of {names}")
    dotted = [word.removeprefix("sweep.") for word in words if word.startswith("sweep.")]
    known = list(SweepConfig.model_fields)
    if unknown := [key for word in dotted if (key := word.partition("=")[0]) not in known]:
        raise ConfigError(f"sweep.{unknown[0]}: no such key; there are {', '.join(known)}")
    try:
        values = OmegaConf.merge(OmegaConf.load(file), OmegaConf.from_dotlist(dotted))
        return SweepConfig.model_validate(OmegaConf.to_container(values, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"sweep.{one_line(error)}") from error
    except ValidationError as error:
        raise ConfigError(f"sweep.{explain(error, SweepConfig)}") from error


def _check_settings(plan: SweepPlan) -> None:
    """Refuse settings that are impossible, contradict each other, or that nothing reads. Raises ConfigError."""
    settings = plan.settings
    if settings.search == "grid":
        if settings.trials is not None:
            raise ConfigError("sweep.trials: a grid has as many trials as it has combinations; leave it out")
        if endless := [key for key, distribution in plan.space.items() if not isinstance(distribution, Choice)]:
            raise ConfigError(f"{endless[0]}: a grid needs choice(…) or range(…); or choose another sweep")
        if plan.num_trials > MAX_GRID:
            raise ConfigError(f"the grid has {plan.num_trials} combinations, more than {MAX_GRID}: use sweep=random")
    changed = settings.model_dump(exclude_defaults=True)
    for key, scheduler in (("grace_steps", "asha"), ("reduction", "asha"), ("interval_steps", "pbt")):
        if key in changed and settings.scheduler != scheduler:
            raise ConfigError(f"sweep.{key}={changed[key]}: only sweep.scheduler={scheduler} reads it")
        if key != "reduction" and changed.get(key, 0) > plan.steps:
            raise ConfigError(f"sweep.{key}={changed[key]}: must be from 1 to steps={plan.steps}")
    if settings.scheduler != "none":
        if {"steps", "eval_every"} & set(plan.space):
            raise ConfigError("steps and eval_every cannot be searched where trials are compared on their way")
        if plan.interval >= plan.steps:
            raise ConfigError(f"eval_every: {settings.scheduler} compares trials on their way; set it below steps")
    if settings.scheduler == "pbt":
        if settings.search != "random":
            raise ConfigError("sweep.scheduler=pbt draws its own values: it goes with sweep.search=random only")
        if plan.num_trials < 2:
            raise ConfigError("sweep.trials: a population has at least 2")


def trial_words(plan: SweepPlan, group: str) -> tuple[str, ...]:
    """The words that the sweep adds to every trial: its group in Weights & Biases, and the checkpoints PBT copies."""
    added = [] if any(word.startswith("tracking.group=") for word in plan.fixed) else [f"tracking.group={group}"]
    if plan.settings.scheduler == "pbt":
        added.append(f"checkpoint_every={plan.settings.interval_steps or plan.interval}")
    return tuple(added)


class SweepFolder:
    """The folder of a sweep, and the paths of its files.

    runs/sweep-calc_tiny-20260101-120000/
      sweep.yaml       the command line, which `agl sweep resume=` reads
      trial-000/ …     the trials, which are ordinary runs
      logs/            the terminal output of each trial
      trials.jsonl     a line for each trial: its searched values, its state, its held-out rewards
      experiment/best.yaml, curves.png, parallel.png
    """

    def __init__(self, path: Path) -> None:
        self.path: Final = path
        self.command_file: Final = path / "sweep.yaml"
        self.trials: Final = path / "trials.jsonl"
        self.best: Final = path / "experiment" / "best.yaml"
        self.curves: Final = path / "curves.png"
        self.parallel: Final = path / "parallel.png"

    @classmethod
    def create(cls, root: Path, plan: SweepPlan) -> SweepFolder:
        """Make a new folder in `root`, with the command line in it. Raises UserError if `root` cannot be written."""
        folder = cls(new_folder(root, f"sweep-{plan.experiment}-{time.strftime('%Y%m%d-%H%M%S')}"))
        (folder.path / "logs").mkdir()
        content = {"command": list(plan.command), "trials": plan.num_trials}
        folder.command_file.write_text(yaml.safe_dump(content, allow_unicode=True))
        return folder

    @classmethod
    def open(cls, path: Path) -> SweepFolder:
        """Open the folder of an earlier sweep. Raises UserError if `path` is not a sweep."""
        folder = cls(path)
        if not folder.command_file.is_file():
            raise UserError(f"{path} is no sweep: it has no {folder.command_file.name}")
        return folder

    def command(self) -> list[str]:
        """The command line with which the sweep was started, with the names that its keys have today."""
        return rename_keys(str(word) for word in yaml.safe_load(self.command_file.read_text())["command"])

    def num_trials(self) -> int:
        """The number of trials that were planned; 0 if the sweep is of an earlier version, which did not write it."""
        return int(yaml.safe_load(self.command_file.read_text()).get("trials", 0))

    def write(self, records: Sequence[TrialRecord]) -> None:
        files.write_text(self.trials, "".join(json.dumps(asdict(record)) + "\n" for record in records))

    def read(self) -> list[TrialRecord]:
        """Read trials.jsonl; empty if the sweep has not written it yet."""
        if not self.trials.is_file():
            return []
        rows = [json.loads(line) for line in self.trials.read_text(encoding="utf-8").split("\n") if line]
        for row in rows:
            row |= {"words": tuple(rename_keys(row["words"])), "rewards": tuple(map(tuple, row["rewards"]))}
        return [TrialRecord(**row) for row in rows]


def best_of(records: Sequence[TrialRecord]) -> TrialRecord | None:
    """The trial with the highest last held-out reward, and among equals the most steps; failed trials do not count. The
    maximum of many noisy rewards overestimates: run the best values again for an unbiased figure."""
    known = [record for record in records if record.state in ("done", "stopped") and math.isfinite(record.last)]
    return max(known, key=lambda record: (record.last, record.step), default=None)


def best_experiment(plan: SweepPlan, best: TrialRecord) -> str:
    """The text of the best trial's experiment file, which extends the swept experiment with the trial's values.

    Example: experiment=calc_tiny, steps=8, credit=air, algorithm.lr=0.001 ->
        defaults: [calc_tiny, override /credit: air, _self_]
        steps: 8
        algorithm: {lr: 0.001}
    """
    conf = project_folder("conf")
    pairs = [word.partition("=")[::2] for word in (*plan.fixed, *best.words)]
    groups = {key: value for key, value in pairs if (conf / key).is_dir() and key != "experiment"}
    of_the_sweep = ("runs_dir", "tracking.group", "checkpoint_every", "experiment")
    values = [f"{key}={value}" for key, value in pairs if not (conf / key).is_dir() and key not in of_the_sweep]
    defaults: list[Any] = [Path(dict(pairs)["experiment"]).stem]
    defaults += [{f"override /{key}": value} for key, value in groups.items()]
    body = {"defaults": [*defaults, "_self_"], "experiment": f"{plan.experiment}_best"}
    yaml_text = OmegaConf.to_yaml(OmegaConf.merge(body, OmegaConf.from_dotlist(values)))
    return (
        "# @package _global_\n"
        f"# The best of {plan.num_trials} trials: held-out reward {best.last:.3f} at step {best.step} ({best.run}).\n"
        f"# agl sweep {shlex.join(plan.command)}\n{yaml_text}"
    )
