"""agl: train, config, submit, eval, serve, sweep, reproduce, score, runs, explain, import, export, journal, doctor."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from agent_lightning import __version__
from agent_lightning.cli import benchmarks
from agent_lightning.core.errors import AgentLightningError, UserError
from agent_lightning.core.text import one_line
from agent_lightning.core.types import Outcome

USER_ERROR = 2
FAILED = 1
INTERRUPTED = 130

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 the run failed, 2 bad input (one line says what to do), 130 stopped."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return asyncio.run(_run(options))
    except AgentLightningError as error:
        sys.stderr.write(f"agl: {one_line(error)}\n")
        return USER_ERROR if isinstance(error, UserError) else FAILED
    except KeyboardInterrupt:
        sys.stderr.write("agl: interrupted\n")
        return INTERRUPTED


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """KEY=VALUE may come before, between and after options: argparse takes them in one place, and returns the rest."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


async def _run(options: argparse.Namespace) -> int:
    """Run a command and return its exit code. Commands are imported here, so that `agl --help` answers at once."""
    match options.command:
        case "doctor":
            from agent_lightning.cli import doctor

            return doctor.doctor()
        case "journal":
            from agent_lightning.cli import journal

            return journal.check(options.path)
        case "import" | "export":
            from agent_lightning.cli import exchange

            if options.command == "import":
                return exchange.import_traces(options.files, options.out)
            return exchange.export_run(options.run, options.out, options.format)
        case "explain":
            from agent_lightning.cli import inspect

            return inspect.show_rollout(options.run, options.rollout, tokens=options.tokens)
        case "runs":
            from agent_lightning.cli import inspect

            wanted = inspect.Wanted(options.split, options.outcome, options.min_reward, options.max_reward)
            return inspect.show_runs(options.path, wanted, options.limit)
        case "score" | "reproduce":
            return _benchmark(options)
        case "config":
            from agent_lightning.config import reference

            sys.stdout.write(reference.show(options.overrides, changed=options.changed, as_yaml=options.yaml))
            return 0
        case "submit":
            return await _submit(options)
        case "eval" | "serve":
            from agent_lightning.cli import train

            if options.command == "serve":
                return await train.serve(options.overrides)
            return await train.evaluate(options.overrides, split=options.split, out=options.out)
        case "train" if options.dry_run and not options.multirun:
            return _dry_run(options)
        case "train" if not options.multirun:
            from agent_lightning.cli import train

            overrides, resume = _resume(options.overrides)
            return await train.train(overrides, resume=resume)
    return _sweep(options)


def _benchmark(options: argparse.Namespace) -> int:
    if options.command == "score":
        given = {name: vars(options)[name] for name in benchmarks.score_paths()}
        return benchmarks.score(
            options.benchmark, options.file, {name: path for name, path in given.items() if path is not None}
        )
    return benchmarks.reproduce(
        options.benchmark,
        scale=options.scale,
        seeds=options.seeds,
        runs=options.runs,
        out=options.out or Path("runs") / f"reproduce-{options.benchmark}-{options.scale}",
        overrides=options.overrides,
    )


def _sweep(options: argparse.Namespace) -> int:
    from agent_lightning.cli.train import sweep
    from agent_lightning.sweeps.plan import hydra_words

    words, resume = _resume(options.overrides)
    words = hydra_words(words) if options.multirun and resume is None else words
    return sweep(words, resume=Path(resume) if resume is not None else None)


async def _submit(options: argparse.Namespace) -> int:
    from agent_lightning.core.ray_private import use_token

    use_token()  # before Ray is imported, which reads it
    from agent_lightning.cli.submit import Submission, submit

    how = Submission(
        address=options.address,
        runtime_env=options.runtime_env,
        wait=options.wait,
        follow=options.follow,
        out=options.out,
    )
    return await submit(options.overrides, how)


def _dry_run(options: argparse.Namespace) -> int:
    from rich.console import Console

    from agent_lightning.cli import dry_run
    from agent_lightning.config.load import load
    from agent_lightning.launch import checks

    config = load(options.overrides)
    inspection = checks.inspect(config, dry_run.assumed(options.assume) if options.assume else ())
    dry_run.show(inspection, Console())
    return USER_ERROR if inspection.missing else 0


def _resume(overrides: Sequence[str]) -> tuple[list[str], str | None]:
    """`resume=RUN` is no key of the config: it says where the config comes from."""
    runs = [item.removeprefix("resume=") for item in overrides if item.startswith("resume=")]
    rest = [item for item in overrides if not item.startswith("resume=")]
    return rest, runs[-1] if runs else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="agl", description="Reinforcement learning for any LLM agent, on Ray.")
    parser.add_argument("--version", action="version", version=f"agl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = _add(
        commands,
        "train",
        "train a policy on the rollouts of an agent",
        "agl train experiment=calc_tiny seed=1",
        "agl train experiment=calc_mawps data.root=DIR",
        "agl train resume=runs/calc_tiny-s0-20260101-120000 steps=80",
        overrides=True,
    )
    train.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    train.add_argument("--assume", metavar="NODESxGPUS", help="of --dry-run: plan for such a cluster, e.g. 1x8")
    _add_cluster(commands)
    _add_using(commands)
    sweep = _add(
        commands,
        "sweep",
        "search the values of any keys: random, grid, ASHA, population-based training, Bayesian",
        "agl sweep experiment=calc_tiny sweep=asha eval_every=4 'algorithm.lr=loguniform(1e-4,3e-3)' "
        "'credit=choice(identical,air)'",
        "agl sweep resume=runs/sweep-calc_tiny-20260101-120000",
        overrides=True,
    )
    for command in (train, sweep):
        command.add_argument("--multirun", action="store_true", help="Hydra's sweeps: every combination of KEY=A,B")
    _add_benchmarks(commands)
    _add_reading(commands)
    _add_exchange(commands)
    journal = _add(
        commands,
        "journal",
        "verify the journal of a run: every record, the rollouts it holds, and where it is damaged",
        "agl journal check runs/calc_tiny-s0-20260101-120000",
    )
    journal.add_argument("what", choices=("check",))
    journal.add_argument("path", type=Path, help="a run's folder, or a journal's")
    _add(commands, "doctor", "what is installed, what is wrong, and what to type", "agl doctor")
    return parser


def _add_cluster(commands: Commands) -> None:
    """The commands that look at a run before it starts, and start it elsewhere."""
    config = _add(
        commands,
        "config",
        "every key of a config, its value, and where that came from; or what a key means",
        "agl config experiment=calc_tiny algorithm.lr=1e-3 --changed\n  agl config algorithm.lr credit",
        overrides=True,
    )
    config.add_argument("--changed", action="store_true", help="leave out what has its default")
    config.add_argument("--yaml", action="store_true", help="the entire config as YAML")
    submit = _add(
        commands,
        "submit",
        "train as a Ray job on a cluster",
        "agl submit experiment=calc_tiny --address http://HEAD:8265 --follow",
        overrides=True,
    )
    submit.add_argument("--address", help="of the dashboard (default: RAY_API_SERVER_ADDRESS, or this machine's)")
    submit.add_argument("--runtime-env", type=Path, help="(default: runtime_env.yaml, here or in the project)")
    submit.add_argument("--wait", action="store_true", help="until it ends; its exit code is this command's")
    submit.add_argument("--follow", action="store_true", help="and show its log")
    submit.add_argument(
        "--out", type=Path, default=Path("runs"), help="where the run's files are brought (default: runs)"
    )


def _add_using(commands: Commands) -> None:
    """The commands that train nothing."""
    evaluate = _add(
        commands,
        "eval",
        "evaluate a model on a task set, without training",
        "agl eval experiment=calc_tiny model.path=examples/calc_x/tiny_policy --out result.json",
        overrides=True,
    )
    evaluate.add_argument("--split", choices=("train", "val"), default="val", help="which tasks (default: val)")
    evaluate.add_argument("--out", type=Path, help="also write the JSON here")
    _add(
        commands,
        "serve",
        "start gateway and policy alone, to point your own agent at",
        "agl serve experiment=calc_tiny serving.port=8000",
        overrides=True,
    )


def _add_benchmarks(commands: Commands) -> None:
    """The commands that compare with what others have published."""
    reproduce = _add(
        commands,
        "reproduce",
        "an experiment of the paper with several seeds, and a report beside the published figures",
        "agl reproduce calc_x",
        "agl reproduce spider data.root=DIR --seeds 0,1",
        "agl reproduce calc_x --runs runs/calc_tiny-s0 runs/calc_tiny-s1 --out report",
    )
    reproduce.add_argument("benchmark", choices=benchmarks.names())
    reproduce.add_argument(
        "--scale", choices=("tiny", "paper"), default="tiny", help="a laptop's CPU, or the paper's GPUs"
    )
    reproduce.add_argument("--seeds", type=_numbers, default=[0, 1, 2], metavar="0,1,2", help="(default: 0,1,2)")
    reproduce.add_argument(
        "--runs", type=Path, nargs="+", default=[], metavar="RUN", help="report on these, run nothing"
    )
    reproduce.add_argument("--out", type=Path, help="folder of the report (default: runs/reproduce-BENCHMARK-SCALE)")
    _add_overrides(reproduce)
    score = _add(
        commands,
        "score",
        "score anyone's predictions: rows with their scores, then the totals, as JSON lines",
        "agl score musique predictions.jsonl",
        "agl score spider predictions.jsonl.gz --databases DIR > scored.jsonl",
    )
    score.add_argument("benchmark", choices=benchmarks.names())
    score.add_argument("file", type=Path, help=".jsonl or .jsonl.gz, rows with `pred`; - reads standard input")
    for name, readers in benchmarks.score_paths().items():
        score.add_argument(f"--{name}", type=Path, help="; ".join(f"{of}: {text}" for of, text in readers.items()))


def _add_reading(commands: Commands) -> None:
    """The commands that read what a run wrote."""
    runs = _add(
        commands,
        "runs",
        "list runs, or the rollouts of a run",
        "agl runs",
        "agl runs runs/calc_tiny-s0-20260101-120000 --outcome timeout",
        "agl runs runs/calc_tiny-s0-20260101-120000 --split val --max-reward 0",
    )
    runs.add_argument("path", type=Path, nargs="?", default=Path("runs"), help="a folder of runs, or a run")
    runs.add_argument("--split", choices=("train", "val"), default="train", help="which rollouts (default: train)")
    runs.add_argument("--outcome", choices=[outcome.value for outcome in Outcome], help="only those that ended so")
    runs.add_argument("--min-reward", type=float, default=-math.inf)
    runs.add_argument("--max-reward", type=float, default=math.inf)
    runs.add_argument("--limit", type=int, default=50, help="rows to show (default: 50)")
    explain = _add(
        commands,
        "explain",
        "everything that became of a rollout: spans, rewards, advantages, tokens",
        "agl explain runs/calc_tiny-s0-20260101-120000 train-12-3 --tokens",
    )
    explain.add_argument("run", type=Path, help="the run's folder")
    explain.add_argument("rollout", help="the rollout's id, as `agl runs RUN` lists it")
    explain.add_argument("--tokens", action="store_true", help="also the sampled text, coloured by advantage")


def _add_exchange(commands: Commands) -> None:
    """The commands that read what other tools write, and write what they read."""
    bring = _add(
        commands,
        "import",
        "traces of other systems -> rollouts, and chats to warm-start a model with",
        "agl import langfuse-*.json runs.jsonl --out imported",
    )
    bring.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="traces; the format is seen from what is in it"
    )
    bring.add_argument("--out", type=Path, required=True, help="folder for rollouts.jsonl and sft.jsonl")
    send = _add(
        commands,
        "export",
        "the rollouts of a run as JSON lines, or as OpenTelemetry traces",
        "agl export runs/calc_tiny-s0-20260101-120000 --out exported --format otlp",
    )
    send.add_argument("run", type=Path, help="the run's folder")
    send.add_argument("--out", type=Path, required=True, help="folder for rollouts.jsonl or traces.jsonl")
    send.add_argument("--format", choices=("jsonl", "otlp"), default="jsonl", help="(default: jsonl)")


def _add(
    commands: Commands, name: str, help_text: str, *examples: str, overrides: bool = False
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=help_text,
        description=help_text,
        epilog="\n  ".join(("example:", *examples)),
        formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the line breaks of the examples
    )
    if overrides:
        _add_overrides(command)
    return command


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="config overrides, as in Hydra")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
