"""The command line: help with examples, and bad input refused in one line before anything starts."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent_lightning import __version__
from agent_lightning.api.cli.main import USER_ERROR, main
from agent_lightning.config.load import load, project_folder, to_yaml
from agent_lightning.launch.sweeps.plan import plan_sweep
from agent_lightning.run.state import State, checkpoint_folder, write_state
from agent_lightning.run.tasks import TaskCursor
from agent_lightning.run.tracking import RunDirectory

EXPERIMENTS = ", ".join(sorted(file.stem for file in (project_folder("conf") / "experiment").glob("*.yaml")))
COMMANDS = (
    "train",
    "config",
    "submit",
    "eval",
    "serve",
    "sweep",
    "reproduce",
    "score",
    "runs",
    "explain",
    "import",
    "export",
    "doctor",
)


@pytest.fixture
def model() -> str:
    """A model that passes the checks."""
    return f"model.path={Path(__file__).parents[2] / 'examples/calc_x/tiny_policy'}"


def refuse(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command says of bad input."""
    started = time.monotonic()
    assert main(arguments) == USER_ERROR
    assert time.monotonic() - started < 20
    captured = capfd.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"agl: [^\n]+\n", captured.err)
    return captured.err.removeprefix("agl: ").strip()


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^ +{command}( |$)", text, re.MULTILINE) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"example:\n  agl {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_keys_of_an_example_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    examples = re.findall(r"^  agl \w+ ((?:[\w.]+=\S+ ?)+)", capsys.readouterr().out, re.MULTILINE)
    for example in examples:
        if "resume=" not in example and command != "sweep":
            load(example.split())


def test_the_example_of_a_sweep_can_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    (example, *_) = re.findall(r"^  agl sweep (.*)", capsys.readouterr().out, re.MULTILINE)
    plan, _ = plan_sweep(shlex.split(example))
    assert set(plan.space) == {"algorithm.lr", "credit"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "experiment=toy", "algorithm.lrr=uniform(1,2)"], "did you mean algorithm.lr?"),
        (["sweep", "resume=/nope"], "/nope is no sweep: it has no sweep.yaml"),
        (["train", "--multirun", "experiment=toy", "seed=1"], "needs something to search"),
        (["reproduce", "calc_x", "algorithm.lrr=1"], "did you mean algorithm.lr?"),
        (["reproduce", "calc_x", "--runs", "/nope"], "/nope is no run: it has no config.yaml"),
    ],
)
def test_several_runs_are_refused_before_the_first_starts(
    arguments: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refuse(capfd, *arguments)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"agl {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["trane"], ["eval", "--split", "test"]])
def test_a_command_that_there_is_not_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == USER_ERROR
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "eval", "serve"])
def test_a_wrong_config_is_refused_by_every_command(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert refuse(capfd, command, "experiment=nope").endswith(f"choose one of {EXPERIMENTS}")
    assert refuse(capfd, command, "experiment=calc_tiny", "algorithm.lrr=1").endswith("did you mean algorithm.lr?")
    assert refuse(capfd, command, "experiment=calc_tiny", "steps=ten") == "steps=ten: must be a whole number"


@pytest.mark.parametrize("command", ["train", "eval", "serve"])
def test_a_model_that_is_not_there(command: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = (command, "experiment=calc_tiny")
    assert refuse(capfd, *arguments, "model.path=/no/model").startswith("model.path=/no/model: no such folder")
    assert "has no config.json" in refuse(capfd, *arguments, f"model.path={tmp_path}")


@pytest.mark.parametrize("command", ["train", "eval", "serve"])
def test_a_port_in_use(command: str, model: str, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refuse(capfd, command, "experiment=calc_tiny", model, f"serving.port={port}")
    assert line.startswith(f"serving.port={port} cannot be used on 127.0.0.1")


@pytest.mark.parametrize("command", ["train", "eval", "serve"])
def test_more_memory_than_there_is(command: str, model: str, capfd: pytest.CaptureFixture[str]) -> None:
    line = refuse(capfd, command, "experiment=calc_tiny", model, "serving.kv_cache_gib=100000")
    assert re.match(r"serving.kv_cache_gib=100000 .* but [\d.]+ GiB of memory are free", line)


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_data_folder_that_is_not_there(command: str, model: str, capfd: pytest.CaptureFixture[str]) -> None:
    line = refuse(capfd, command, "experiment=calc_mawps", model, "data.root=/nope")
    assert re.match(r"/nope/mawps_\w+\.jsonl\[\.gz\] does not exist; set data\.root", line)


def test_a_malformed_row_is_named_by_file_and_line(
    model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mawps_train.jsonl"
    file.write_text('{"id": "a", "question": "1+1?", "result": "2"}\n{"id": "b", "question\n')
    shutil.copy(file, tmp_path / "mawps_validation.jsonl")
    line = refuse(capfd, "train", "experiment=calc_mawps", model, f"data.root={tmp_path}")
    assert line.startswith(f"{file}:2: not JSON")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("agent.target=no/agent.py:solve", "no/agent.py"),
        ("agent.target=examples/calc_x/agent.py:sove", "sove"),
        ("agent.reward=json:score", "score"),
        ("agent.mode=thread", "mode thread needs a plain `def`"),
    ],
)
def test_an_agent_that_cannot_run(override: str, message: str, model: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert message in refuse(capfd, "train", "experiment=calc_tiny", model, override)


def test_resume_needs_a_run_with_a_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert str(tmp_path / "none") in refuse(capfd, "train", f"resume={tmp_path / 'none'}")
    assert str(tmp_path) in refuse(capfd, "train", f"resume={tmp_path}")
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(load(["experiment=calc_tiny"])))
    assert "nothing to resume from" in refuse(capfd, "train", f"resume={run}")


@pytest.mark.parametrize("place", ["{}", "file://{}", "local://{}"])
def test_the_dry_run_of_a_run_that_goes_on(place: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(load(["experiment=toy", "steps=3"])))
    assert main(["train", f"resume={place.format(tmp_path)}", "steps=7", "--dry-run"]) == 0
    assert " 7 steps: " in capfd.readouterr().out
    nothing = tmp_path / "none"
    assert f"{nothing} is no run: it has no config.yaml" in refuse(capfd, "train", f"resume={nothing}", "--dry-run")


def test_a_run_that_is_alive_is_not_touched(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither by `resume` of the run nor of a sweep; and when the process that has it has ended, its lock is gone."""
    run = tmp_path / "run"
    folder = checkpoint_folder(run / "checkpoints", 4)
    folder.mkdir(parents=True)
    write_state(folder, State(cursor=TaskCursor(seed=0), step=4))
    (run / "config.yaml").write_text(to_yaml(load(["experiment=toy"])))
    (run / "sweep.yaml").write_text("command: [experiment=toy, algorithm.lr=choice(1)]")
    (run / "metrics.jsonl").write_text('{"step": 5, "wall_s": 1.0}\n')
    with RunDirectory.open(run).lock():
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        assert "another process is at work on this run" in refuse(capfd, "train", f"resume={run}")
        assert "another process is at work on this sweep" in refuse(capfd, "sweep", f"resume={run}")
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    holder = [
        sys.executable,
        "-c",
        f"from agent_lightning.run.tracking import *; RunDirectory(Path({str(run)!r})).lock()",
    ]
    subprocess.run(holder, check=True)
    RunDirectory.open(run).lock().close()


def test_a_refused_run_leaves_no_folder(model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    refuse(capfd, "train", "experiment=calc_mawps", model, "data.root=/nope", f"runs_dir={runs}")
    assert not runs.exists()


def test_bad_input_is_refused_before_ray_is_imported(model: str) -> None:
    script = (
        "import sys; from agent_lightning.api.cli.main import main; main(sys.argv[1:]); sys.exit('ray' in sys.modules)"
    )
    # The tasks are the last thing that is checked.
    command = [sys.executable, "-c", script, "train", "experiment=calc_mawps", model, "data.root=/nope"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.startswith("agl: /nope/")


def test_the_module_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "agent_lightning", "train", "experiment=nope"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (USER_ERROR, "")
    assert ended.stderr == f"agl: experiment=nope: unknown; choose one of {EXPERIMENTS}\n"


def test_overrides_come_before_and_after_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "experiment=toy", "--changed", "steps=3"]) == 0
    assert re.search(r"steps\s+│ 3\s", capsys.readouterr().out)
    for words in (["config", "experiment=toy", "--changed", "nonsense"], ["view", "runs", "steps=3"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == USER_ERROR
