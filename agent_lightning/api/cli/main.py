"""agl, the command line: what each command is called and takes, and the module that runs it."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from agent_lightning import __version__
from agent_lightning.api.cli import FAILED, STOPPED, USER_ERROR, benchmarks
from agent_lightning.core.errors import AgentLightningError, Stopped, UserError
from agent_lightning.core.text import one_line
from agent_lightning.core.types import Outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 the run failed, 2 bad input (one line says what to do), 130 stopped."""
    parser = _parser()
    # KEY=VALUE may come before, between and after options: argparse takes them in one place, and returns the rest.
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return asyncio.run(_run(options))
    except Stopped:
        return STOPPED
    except AgentLightningError as error:
        sys.stderr.write(f"agl: {one_line(error)}\n")
        return USER_ERROR if isinstance(error, UserError) else FAILED
    except KeyboardInterrupt:
        sys.stderr.write("agl: interrupted\n")
        return STOPPED


async def _run(options: argparse.Namespace) -> int:
    """Run a command and return its exit code. Commands are imported here, so that `agl --help` answers at once."""
    given = vars(options)
    match options.command:
        case "doctor":
            from agent_lightning.api.cli import doctor

            return doctor.doctor_model(options.overrides) if options.overrides else doctor.doctor()
        case "import" | "export" | "journal" | "init":
            from agent_lightning.api.cli import files

            if options.command == "init":
                return files.init_project(options.folder)
            if options.command == "import":
                return files.import_traces(options.files, options.out)
            if options.command == "export":
                names = ("out", "format", "model", "checkpoint", "dtype", "max_shard_size", "merged")
                return files.export_run(options.run, **{name: given[name] for name in names})
            return files.check_journal(options.path)
        case "explain" | "runs" | "view" | "try":
            return await _look(options)
        case "score":
            paths = {name: given[name] for name in benchmarks.score_paths() if name in given}
            return benchmarks.score(options.benchmark, options.file, paths)
        case "reproduce":
            settings = {name: given[name] for name in ("scale", "seeds", "runs", "overrides")}
            out = options.out or Path("runs") / f"reproduce-{options.benchmark}-{options.scale}"
            return benchmarks.reproduce(options.benchmark, out=out, **settings)
        case "config":
            from agent_lightning.config import reference

            sys.stdout.write(reference.show(options.overrides, changed=options.changed, as_yaml=options.yaml))
            return 0
        case "submit":
            from agent_lightning.core.ray_private import use_token

            use_token()  # before Ray is imported, which reads it
            from agent_lightning.api.cli.submit import submit

            settings = {name: given[name] for name in ("address", "runtime_env", "wait", "follow", "out")}
            return await submit(options.overrides, **settings)
        case "train" if options.dry_run and not options.multirun:
            from agent_lightning.api.cli import dry_run

            overrides, resume = _split_resume(options.overrides)
            return dry_run.dry_run(overrides, options.assume, resume)
    return await _work(options)


async def _work(options: argparse.Namespace) -> int:
    """Run a command that trains, evaluates, sweeps or serves."""
    from agent_lightning.api import work

    if options.command == "serve":
        await work.serve(options.overrides)
    elif options.command == "eval":
        figures = await work.evaluate(options.overrides, split=options.split, console=Console(stderr=True))
        text = json.dumps(figures, indent=1)
        if options.out is not None:
            options.out.write_text(text + "\n")
        Console().print_json(text)
    else:
        overrides, resume = _split_resume(options.overrides)
        if options.command == "sweep" or (options.command == "train" and options.multirun):
            await work.sweep(overrides, resume=resume, multirun=options.multirun)
        else:
            await work.train(overrides, resume=resume, supervised=options.command == "sft")
    return 0


def _split_resume(words: Sequence[str]) -> tuple[list[str], str | None]:
    """Overrides, and RUN of `resume=RUN`, which is no key of the config: it says where the config comes from."""
    overrides = [word for word in words if not word.startswith("resume=")]
    *_, resume = [None, *(word.removeprefix("resume=") for word in words if word.startswith("resume="))]
    return overrides, resume


async def _look(options: argparse.Namespace) -> int:
    """Run a command that shows what agents did."""
    if options.command == "try":
        from agent_lightning.api.cli.try_one import try_one

        settings = {name: vars(options)[name] for name in ("task", "split", "toy", "url", "model")}
        return await try_one(options.overrides, **settings)
    if options.command == "view":
        from agent_lightning.api.viewer.command import view

        return await view(options.place, options.port, options.out)
    from agent_lightning.api.viewer import terminal

    if options.command == "explain":
        return terminal.show_rollout(options.run, options.rollout, tokens=options.tokens)
    rewards = (options.min_reward, options.max_reward)
    return terminal.show_runs(options.path, options.split, options.outcome, rewards, options.limit)


_COMMANDS: Final = """\
train: train a policy on the rollouts of an agent
  agl train experiment=calc_tiny seed=1
  agl train experiment=calc_mawps data.root=DIR
  agl train resume=runs/calc_tiny-s0-20260101-120000 steps=80

config: every key of a config, its value, and where that came from; or what a key means
  agl config experiment=calc_tiny algorithm.lr=1e-3 --changed
  agl config algorithm.lr credit
  agl config

sft: supervised training on chats: sft.jsonl of `agl import`, or any JSON lines of OpenAI messages with tools
  agl sft experiment=calc_tiny data.train.path=imported/sft.jsonl steps=100
  agl export runs/sft-calc_tiny-s0-20260101-120000 --model warm
  agl train experiment=calc_tiny model.path=warm

submit: train as a Ray job on a cluster
  agl submit experiment=calc_tiny --address http://HEAD:8265 --follow

eval: evaluate a model on a task set, without training
  agl eval experiment=calc_tiny model.path=examples/calc_x/tiny_policy --out result.json

try: one task through agent and reward, with everything shown: messages, tools, reward, where your code failed
  agl try agent.target=agent.py:solve agent.reward=reward.py:score data.train.path=rows.csv --toy
  agl try experiment=calc_tiny --url https://api.openai.com/v1 --model gpt-5-mini

init: a new project: agent, reward, data, experiment and runtime environment, which run as they are
  agl init mine

serve: start gateway and policy alone, to point your own agent at
  agl serve experiment=calc_tiny serving.port=8000

sweep: search the values of any keys: random, grid, ASHA, population-based training, Bayesian
  agl sweep experiment=calc_tiny sweep=asha eval_every=4 'algorithm.lr=loguniform(1e-4,3e-3)' \
'credit=choice(identical,air)'
  agl sweep resume=runs/sweep-calc_tiny-20260101-120000

reproduce: an experiment of the paper with several seeds, and a report beside the published figures
  agl reproduce calc_x
  agl reproduce spider data.root=DIR --seeds 0,1
  agl reproduce calc_x --runs runs/calc_tiny-s0 runs/calc_tiny-s1 --out report

score: score anyone's predictions: rows with their scores, then the totals, as JSON lines
  agl score musique predictions.jsonl
  agl score spider predictions.jsonl.gz --databases DIR > scored.jsonl

runs: list runs, or the rollouts of a run
  agl runs
  agl runs runs/calc_tiny-s0-20260101-120000 --outcome timeout
  agl runs runs/calc_tiny-s0-20260101-120000 --split val --max-reward 0

explain: everything that became of a rollout: spans, rewards, advantages, tokens
  agl explain runs/calc_tiny-s0-20260101-120000 train-12-3 --tokens

view: see runs in the browser: curves, groups side by side, conversations, every token and why it was trained
  agl view
  agl view runs/calc_tiny-s0-20260101-120000
  agl view runs/calc_tiny-s0-20260101-120000 --out run.html

import: traces of other systems -> rollouts, and chats to warm-start a model with
  agl import langfuse-*.json runs.jsonl --out imported

export: the trained model of a run in Hugging Face's format; or its rollouts, as JSON lines or OpenTelemetry traces
  agl export runs/calc_tiny-s0-20260101-120000 --model policy
  agl export runs/calc_tiny-s0-20260101-120000 --out exported --format otlp

journal: verify the journal of a run: every record, the rollouts it holds, and where it is damaged
  agl journal check runs/calc_tiny-s0-20260101-120000

doctor: what is installed, what is wrong, and what to type; or what a model is, and whether it can be trained here
  agl doctor
  agl doctor Qwen/Qwen2.5-0.5B-Instruct model.max_len=8192"""
"""Every command with its help and its examples, in the order in which `agl --help` lists them."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="agl", description="Reinforcement learning for any LLM agent, on Ray.")
    parser.add_argument("--version", action="version", version=f"agl {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    keeps_lines = argparse.RawDescriptionHelpFormatter
    commands = {}
    for block in _COMMANDS.split("\n\n"):
        title, _, examples = block.partition("\n")
        name, _, text = title.partition(": ")
        commands[name] = subparsers.add_parser(
            name, help=text, description=text, epilog=f"example:\n{examples}", formatter_class=keeps_lines
        )
    _add_arguments(commands)
    return parser


def _add_arguments(commands: Mapping[str, argparse.ArgumentParser]) -> None:
    def add(names: str, *flags: str, **settings: Any) -> None:
        for name in names.split():
            commands[name].add_argument(*flags, **settings)

    flag = {"action": "store_true"}
    add("train", "--dry-run", **flag, help="check everything, print the plan, start nothing")
    add("train", "--assume", metavar="NODESxGPUS", help="of --dry-run: plan for such a cluster, e.g. 1x8")
    add("train sweep", "--multirun", **flag, help="Hydra's sweeps: every combination of KEY=A,B")
    add("config", "--changed", **flag, help="leave out what has its default")
    add("config", "--yaml", **flag, help="the entire config as YAML")
    add("submit", "--address", help="of the dashboard (default: RAY_API_SERVER_ADDRESS, or this machine's)")
    add("submit", "--runtime-env", type=Path, help="(default: runtime_env.yaml, here or in the project)")
    add("submit", "--wait", **flag, help="until it ends; its exit code is this command's")
    add("submit", "--follow", **flag, help="and show its log")
    add("submit", "--out", type=Path, default=Path("runs"), help="where the run's files are brought (default: runs)")
    add("eval", "--split", choices=("train", "val"), default="val", help="which tasks (default: val)")
    add("eval", "--out", type=Path, help="also write the JSON here")
    add("reproduce score", "benchmark", choices=benchmarks.names())
    add("reproduce", "--scale", choices=("tiny", "paper"), default="tiny", help="a laptop's CPU, or the paper's GPUs")
    add("reproduce", "--seeds", type=_numbers, default=[0, 1, 2], metavar="0,1,2", help="(default: 0,1,2)")
    add("reproduce", "--runs", type=Path, nargs="+", default=[], metavar="RUN", help="report on these, run nothing")
    add("reproduce", "--out", type=Path, help="folder of the report (default: runs/reproduce-BENCHMARK-SCALE)")
    add("try", "--task", default="0", help="its number from 0, or its id (default: 0)")
    add("try", "--split", choices=("train", "val"), default="train", help="which tasks (default: train)")
    add("try", "--toy", **flag, help="against the toy, which needs no model: it says one of a few words")
    add("try", "--url", default="", help="against any OpenAI-compatible URL ending in /v1; OPENAI_API_KEY has its key")
    add("try", "--model", default="", help="of --url: the model's name there (default: model.path)")
    add("init", "folder", type=Path, help="a new folder, or an empty one")
    add(
        "train sft config submit try eval serve sweep reproduce",
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="config overrides, as in Hydra",
    )
    add("doctor", "overrides", nargs="*", metavar="MODEL|KEY=VALUE", help="a model's folder or hub id, and overrides")
    add("score", "file", type=Path, help=".jsonl or .jsonl.gz, rows with `pred`; - reads standard input")
    for name, readers in benchmarks.score_paths().items():
        text = "; ".join(f"{benchmark}: {text}" for benchmark, text in readers.items())
        add("score", f"--{name}", type=Path, default=argparse.SUPPRESS, help=text)
    add("runs", "path", type=Path, nargs="?", default=Path("runs"), help="a folder of runs, or a run")
    add("runs", "--split", choices=("train", "val"), default="train", help="which rollouts (default: train)")
    add("runs", "--outcome", choices=[outcome.value for outcome in Outcome], help="only those that ended so")
    add("runs", "--min-reward", type=float, default=-math.inf)
    add("runs", "--max-reward", type=float, default=math.inf)
    add("runs", "--limit", type=int, default=50, help="rows to show (default: 50)")
    add("explain", "run", type=Path, help="the run's folder")
    add("explain", "rollout", help="the rollout's id, as `agl runs RUN` lists it")
    add("explain", "--tokens", **flag, help="also the sampled text, coloured by advantage")
    add("view", "place", nargs="?", default="runs", help="a run, a sweep, or a folder of them (default: runs)")
    add("view", "--port", type=int, default=0, help="(default: a free one)")
    add("view", "--out", type=Path, metavar="FILE", help="write the pages of a run to one HTML file instead")
    add("import", "files", type=Path, nargs="+", metavar="FILE", help="traces; the format is seen from what is in it")
    add("import", "--out", type=Path, required=True, help="folder for rollouts.jsonl and sft.jsonl")
    _add_export_arguments(commands["export"])
    add("journal", "what", choices=("check",))
    add("journal", "path", type=Path, help="a run's folder, or a journal's")


def _add_export_arguments(export: argparse.ArgumentParser) -> None:
    add = export.add_argument
    add("run", help="the run's folder, or its place: s3://bucket/runs/NAME")
    what = export.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, metavar="DIR", help="new folder for the model")
    what.add_argument("--out", type=Path, help="folder for rollouts.jsonl or traces.jsonl")
    add("--checkpoint", type=int, metavar="STEP", help="of --model (default: the newest checkpoint)")
    add("--dtype", choices=("float32", "bfloat16"), help="of --model (default: the run's model.dtype)")
    add("--max-shard-size", default="5GB", metavar="SIZE", help="of a file of --model (default: 5GB)")
    add("--merged", action="store_true", help="of --model, with LoRA: the model and not the adapter alone")
    add("--format", choices=("jsonl", "otlp"), default="jsonl", help="(default: jsonl)")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
