"""agl: train, config, submit, eval, serve, sweep, reproduce, score, runs, explain, import, export, journal, doctor."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from agent_lightning import __version__
from agent_lightning.core.errors import AgentLightningError, UserError
from agent_lightning.core.types import Outcome

USER_ERROR = 2
FAILED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 the run failed, 2 bad input (one line says what to do), 130 stopped."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return asyncio.run(_run(options))
    except UserError as error:
        _say(f"agl: {_one_line(error)}")
        return USER_ERROR
    except AgentLightningError as error:
        _say(f"agl: {_one_line(error)}")
        return FAILED
    except KeyboardInterrupt:
        _say("agl: interrupted")
        return 130


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
    # Imported here, so that `agl --help` answers at once.
    if options.command == "doctor":
        from agent_lightning.cli.doctor import doctor

        return doctor()
    if options.command == "journal":
        from agent_lightning.cli import journal as inspect_journal

        return inspect_journal.check(options.path)
    if options.command in ("import", "export"):
        from agent_lightning.cli import exchange

        if options.command == "import":
            return exchange.import_traces(options.files, options.out)
        return exchange.export_run(options.run, options.out, options.format)
    if options.command == "score":
        from agent_lightning.cli import scoring

        return scoring.run(options.benchmark, options.file, options.databases)
    if options.command in ("sweep", "reproduce") or (options.command == "train" and options.multirun):
        return _many(options)
    if options.command == "submit":
        return await _submit(options)
    if options.command == "config" or (options.command == "train" and options.dry_run):
        return _look(options)
    from agent_lightning.cli import train as commands

    if options.command == "explain":
        return commands.show_rollout(options.run, options.rollout, tokens=options.tokens)
    if options.command == "runs":
        return commands.show_runs(
            options.path,
            split=options.split,
            outcome=options.outcome,
            min_reward=options.min_reward,
            max_reward=options.max_reward,
            limit=options.limit,
        )
    if options.command == "train":
        overrides, resume = _resume(options.overrides)
        return await commands.train(overrides, resume=resume)
    if options.command == "eval":
        return await commands.evaluate(options.overrides, split=options.split, out=options.out)
    return await commands.serve(options.overrides)


async def _submit(options: argparse.Namespace) -> int:
    from agent_lightning.core.ray_private import use_token

    use_token()
    from agent_lightning.cli.submit import Submission, submit

    how = Submission(
        address=options.address,
        runtime_env=options.runtime_env,
        wait=options.wait,
        follow=options.follow,
        out=options.out,
    )
    return await submit(options.overrides, how)


def _many(options: argparse.Namespace) -> int:
    """The commands that start several runs."""
    if options.command == "reproduce":
        from agent_lightning.cli.reproduce import reproduce

        out = options.out or Path("runs") / f"reproduce-{options.benchmark}-{options.scale}"
        return reproduce(
            options.benchmark,
            scale=options.scale,
            seeds=options.seeds,
            runs=options.runs,
            out=out,
            overrides=options.overrides,
        )
    from agent_lightning.cli.train import sweep
    from agent_lightning.sweeps.plan import hydra_words

    words, resume = _resume(options.overrides)
    words = hydra_words(words) if options.multirun and resume is None else words
    return sweep(words, resume=Path(resume) if resume is not None else None)


def _look(options: argparse.Namespace) -> int:
    from rich.console import Console

    from agent_lightning.cli import dry_run
    from agent_lightning.config.load import load
    from agent_lightning.launch import checks

    if options.command == "config":
        return dry_run.show_config(options.overrides, changed=options.changed, console=Console())
    config = load(options.overrides)
    found = checks.inspect(config, dry_run.assumed(options.assume) if options.assume else ())
    dry_run.show(found, Console())
    return USER_ERROR if found.missing else 0


def _resume(overrides: Sequence[str]) -> tuple[list[str], str | None]:
    """`resume=RUN` is no key of the config: it says where the config comes from."""
    found = [item.removeprefix("resume=") for item in overrides if item.startswith("resume=")]
    rest = [item for item in overrides if not item.startswith("resume=")]
    return rest, found[-1] if found else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="agl", description="Reinforcement learning for any LLM agent, on Ray.", formatter_class=_Raw
    )
    parser.add_argument("--version", action="version", version=f"agl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = _add(
        commands,
        "train",
        "train a policy on the rollouts of an agent",
        "agl train experiment=calc_tiny seed=1\n  agl train experiment=calc_mawps data.root=../shared/data/calcx\n"
        "  agl train resume=runs/calc_tiny-s0-20260101-120000 steps=80",
    )
    train.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    train.add_argument("--assume", metavar="NODESxGPUS", help="of --dry-run: plan for such a cluster, e.g. 1x8")
    config, submit = _add_cluster(commands)
    evaluate, serve = _add_using(commands)
    for command in (train, config, submit, evaluate, serve, _add_many(commands, train)):
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="config overrides, as in Hydra")
    _add_scoring(commands)
    _add_reading(commands)
    _add_exchange(commands)
    _add_journal(commands)
    _add(commands, "doctor", "what is installed, what is wrong, and what to type", "agl doctor")
    return parser


def _add_using(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The commands that train nothing: eval and serve."""
    evaluate = _add(
        commands,
        "eval",
        "evaluate a model on a task set, without training",
        "agl eval experiment=calc_tiny model.path=examples/calc_x/tiny_policy --out result.json",
    )
    evaluate.add_argument("--split", choices=("train", "val"), default="val", help="which tasks (default: val)")
    evaluate.add_argument("--out", type=Path, help="also write the JSON here")
    serve = _add(
        commands,
        "serve",
        "start gateway and policy alone, to point your own agent at",
        "agl serve experiment=calc_tiny serving.port=8000",
    )
    return evaluate, serve


def _add_many(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], train: argparse.ArgumentParser
) -> argparse.ArgumentParser:
    """The commands that start several runs; gives that of sweeps."""
    sweep = _add(
        commands,
        "sweep",
        "search the values of any keys: random, grid, ASHA, population-based training, Bayesian",
        "agl sweep experiment=calc_tiny sweep=asha eval_every=4 'algorithm.lr=loguniform(1e-4,3e-3)' "
        "'credit=choice(identical,air)'\n  agl sweep resume=runs/sweep-calc_tiny-20260101-120000",
    )
    for command in (train, sweep):
        command.add_argument("--multirun", action="store_true", help="Hydra's sweeps: every combination of KEY=A,B")
    again = _add(
        commands,
        "reproduce",
        "an experiment of the paper with several seeds, and a report beside the published figures",
        "agl reproduce calc_x\n  agl reproduce spider data.root=DIR --seeds 0,1\n"
        "  agl reproduce calc_x --runs runs/calc_tiny-s0 runs/calc_tiny-s1 --out report",
    )
    again.add_argument("benchmark", choices=("calc_x", "spider", "musique"))
    again.add_argument("--scale", choices=("tiny", "paper"), default="tiny", help="a laptop's CPU, or the paper's GPUs")
    again.add_argument("--seeds", type=_numbers, default=[0, 1, 2], metavar="0,1,2", help="(default: 0,1,2)")
    again.add_argument("--runs", type=Path, nargs="+", default=[], metavar="RUN", help="report on these, run nothing")
    again.add_argument("--out", type=Path, help="folder of the report (default: runs/reproduce-BENCHMARK-SCALE)")
    again.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="config overrides, as in Hydra")
    return sweep


def _add_scoring(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command that scores what something else predicted."""
    score = _add(
        commands,
        "score",
        "score anyone's predictions: rows with their scores, then the totals, as JSON lines",
        "agl score musique predictions.jsonl\n  agl score spider predictions.jsonl.gz --databases DIR > scored.jsonl",
    )
    score.add_argument("benchmark", choices=("spider", "musique", "calc_x"))
    score.add_argument("file", type=Path, help=".jsonl or .jsonl.gz, rows with `pred`; - reads standard input")
    score.add_argument("--databases", type=Path, help="spider: the folder of DB/DB.sqlite")


def _add_journal(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    journal = _add(
        commands,
        "journal",
        "verify the journal of a run: every record, the rollouts it holds, and where it is damaged",
        "agl journal check runs/calc_tiny-s0-20260101-120000",
    )
    journal.add_argument("what", choices=("check",))
    journal.add_argument("path", type=Path, help="a run's folder, or a journal's")


def _add_cluster(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> list[argparse.ArgumentParser]:
    """The commands that look at a run before it starts, and start it elsewhere."""
    config = _add(
        commands,
        "config",
        "every key of a config, its value, and where that came from",
        "agl config experiment=calc_tiny algorithm.lr=1e-3 --changed",
    )
    config.add_argument("--changed", action="store_true", help="leave out what has its default")
    submit = _add(
        commands,
        "submit",
        "train as a Ray job on a cluster",
        "agl submit experiment=calc_tiny --address http://HEAD:8265 --follow",
    )
    submit.add_argument("--address", help="of the dashboard (default: RAY_API_SERVER_ADDRESS, or this machine's)")
    submit.add_argument("--runtime-env", type=Path, help="(default: runtime_env.yaml, here or in the project)")
    submit.add_argument("--wait", action="store_true", help="until it ends; its exit code is this command's")
    submit.add_argument("--follow", action="store_true", help="and show its log")
    submit.add_argument(
        "--out", type=Path, default=Path("runs"), help="where the run's files are brought (default: runs)"
    )
    return [config, submit]


def _add_reading(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The commands that read what a run wrote."""
    runs = _add(
        commands,
        "runs",
        "list runs, or the rollouts of a run",
        "agl runs\n  agl runs runs/calc_tiny-s0-20260101-120000 --outcome timeout\n"
        "  agl runs runs/calc_tiny-s0-20260101-120000 --split val --max-reward 0",
    )
    runs.add_argument("path", type=Path, nargs="?", default=Path("runs"), help="a folder of runs, or a run")
    runs.add_argument("--split", choices=("train", "val"), default="train", help="which rollouts (default: train)")
    runs.add_argument("--outcome", choices=[one.value for one in Outcome], help="only those that ended so")
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


def _add_exchange(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of examples."""


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help_text: str, example: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name, help=help_text, description=help_text, epilog=f"example:\n  {example}", formatter_class=_Raw
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
