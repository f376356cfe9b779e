"""A start and a dry run refuse the same configs, with the same words."""

from __future__ import annotations

import io
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from agent_lightning.api.cli.dry_run import assumed, show
from agent_lightning.api.cli.main import USER_ERROR, main
from agent_lightning.config.load import load, project_folder
from agent_lightning.core.errors import ConfigError, UserError
from agent_lightning.launch.checks import inspect, load_tasks, require

EXPERIMENTS = sorted(file.stem for file in (project_folder("conf") / "experiment").glob("*.yaml"))
WITHOUT_GPUS = pytest.mark.skipif(bool(list(Path("/dev").glob("nvidia[0-9]*"))), reason="this machine has GPUs")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def used_port() -> Iterator[int]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_has_a_dry_run(experiment: str, tmp_path: Path) -> None:
    inspection = inspect(load([f"experiment={experiment}", f"runs_dir={tmp_path}"]), assumed("1x8"))
    out = io.StringIO()
    show(inspection, Console(file=out, width=200))
    assert f"{experiment}, seed 0: nothing is started" in out.getvalue()
    # Only data and hubs may be missing on the machine of the test.
    assert all(line.startswith(("data.", "model:", "agent:")) for line in inspection.missing), inspection.missing
    if experiment in ("toy", "calc_tiny", "calc_team", "calc_sheet"):
        assert inspection.missing == []


def test_a_dry_run_and_a_start_refuse_a_port_in_use(used_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "experiment=toy", f"serving.port={used_port}"]
    refusal = f"serving.port={used_port} cannot be used on 127.0.0.1 (Address already in use): choose another, or 0"
    assert main([*words, "--dry-run"]) == USER_ERROR
    assert f"missing  port: {refusal}" in capsys.readouterr().out
    assert main([*words, "steps=1"]) == USER_ERROR
    assert f"agl: {refusal}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("agent", ["agent.target=tests/nothing.py:solve"]),
        ("agent", ["agent.reward=json:nothing"]),
        ("agent", ["agent.instrument=[nothing]"]),
        ("model", ["experiment=calc_tiny", "model.path=./nothing"]),
        ("memory", ["experiment=calc_tiny", "serving.kv_cache_gib=100000"]),
        ("runs", ["runs_dir=/proc/nothing"]),
        pytest.param("cluster", ["experiment=calc_tiny", "hardware=gpu8"], marks=WITHOUT_GPUS),
        (
            "data.train",
            ["data.train={kind: jsonl, path: nothing.jsonl, target: null, split: null, num: null, seed: null}"],
        ),
        ("data.val", ["data.val={kind: jsonl, path: nothing.jsonl, target: null, split: null, num: null, seed: null}"]),
    ],
)
def test_a_start_raises_what_a_dry_run_shows(what: str, words: list[str], tmp_path: Path) -> None:
    experiment = [] if words[0].startswith("experiment=") else ["experiment=toy"]
    config = load([*experiment, *([] if what == "runs" else [f"runs_dir={tmp_path}"]), *words])
    with pytest.raises(UserError) as refused:
        require(config, "train", "val")
    lines = [re.sub(r"[\d.]+ GiB", "N GiB", line) for line in (*inspect(config).missing, f"{what}: {refused.value}")]
    assert lines[:-1] == lines[-1:], "but for the memory that is free in this moment"


def test_a_dry_run_shows_all_that_a_start_would_refuse_one_by_one(used_port: int) -> None:
    words = ["agent.reward=json:nothing", f"serving.port={used_port}", "runs_dir=/proc/nothing"]
    config = load(["experiment=toy", *words])
    assert [line.partition(":")[0] for line in inspect(config).missing] == ["agent", "port", "runs"]


def test_what_only_serves_needs_no_agent(used_port: int) -> None:
    words = ["experiment=toy", "agent.reward=json:nothing", "runs_dir=/proc/nothing"]
    assert require(load(words)).missing == []
    with pytest.raises(UserError, match="cannot be used"):
        require(load([*words, f"serving.port={used_port}"]))


def test_a_cluster_that_is_too_small() -> None:
    config = load(["experiment=calc_tiny", "hardware=gpu8", "serving.gateways=null"])
    refusal = "cluster: the cluster of 2 nodes is too small: needs 8 GPUs, has 0; choose another hardware=, "
    assert inspect(config, assumed("2x0")).missing == [refusal + "or hardware.address="]
    words = ["train", "experiment=calc_tiny", "--dry-run", "--assume", "2x0"]
    assert [main(words), main([*words, "hardware=gpu8"])] == [0, USER_ERROR]


@WITHOUT_GPUS
def test_a_machine_that_is_too_small() -> None:
    with pytest.raises(UserError, match="this machine is too small: needs 8 GPUs, has 0"):
        require(load(["experiment=calc_tiny", "hardware=gpu8"]), "train", "val")


@pytest.mark.parametrize("words", [["sampling.seeded=true"], ["serving.gateways=1"], ["serving.gateways=2"]])
def test_no_worker_is_left_without_a_gateway(words: list[str]) -> None:
    config = load(["experiment=toy", *words])
    assert inspect(config).missing == []
    assert inspect(load(["experiment=toy", *words, "serving.host=0.0.0.0"]), assumed("2x0")).missing == []
    (line,) = inspect(config, assumed("2x0")).missing
    assert line.startswith(f"cluster: {words[0]}")


@pytest.mark.parametrize("text", ["8", "x8", "2x", "twox8"])
def test_a_cluster_that_cannot_be_assumed(text: str) -> None:
    with pytest.raises(ConfigError, match="give NODESxGPUS"):
        assumed(text)


def test_data_of_ones_own_without_an_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without experiment=: named held-out sets, no held-out set, and files in data.root."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "agent.py").write_text("async def solve(task, policy): return 1.0\n")
    (tmp_path / "data").mkdir()
    for name in ("train", "easy", "hard"):
        (tmp_path / "data" / f"{name}.csv").write_text(f"question,answer\n{name}?,1\n")
    own = ["agent.target=agent.py:solve", "data.train.path=train.csv"]
    config = load(own)
    assert config.experiment == "own"
    assert [task.payload["question"] for task in load_tasks(config, "train")] == ["train?"]
    assert load_tasks(config, "val") == []
    config = load([*own, "data.val_sets={easy: {path: easy.csv}, hard: {path: hard.csv}}"])
    assert [task.task_id for task in load_tasks(config, "val")] == ["easy/easy-1", "hard/hard-1"]
    with pytest.raises(ConfigError, match=r"data\.train\.path: missing; give a file"):
        load_tasks(load(own[:1]), "train")
    with pytest.raises(ConfigError, match=r"^experiment: missing; give experiment=NAME, or agent\.target="):
        load(["data.train.path=train.csv"])
    assert load([*own[:1], "data.train.path=openai/gsm8k"]).data.train.kind == "hub"


def test_a_kl_term_needs_the_policy_at_the_start_as_its_reference() -> None:
    lora = ["model.lora.rank=8", "model.lora.path=examples/smollm2/start", "algorithm.kl_coef=0.01"]
    (line,) = inspect(load(["experiment=calc_tiny", *lora])).missing
    assert "algorithm.kl_coef: its reference would be the model without the adapter of model.lora.path" in line
