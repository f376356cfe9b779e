"""What a run asks of a cluster, and what is said where it is not there."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from agent_lightning.cli.dry_run import assumed, examine, show
from agent_lightning.cli.main import USER_ERROR, main
from agent_lightning.config.load import load, project_folder
from agent_lightning.config.sources import sources
from agent_lightning.core.errors import ConfigError, UserError
from agent_lightning.launch import placement
from agent_lightning.launch.placement import BundleGroup, ModelSize
from agent_lightning.launch.preflight import check_cluster, check_reach

EXPERIMENTS = sorted(file.stem for file in (project_folder("conf") / "experiment").glob("*.yaml"))
GPU8 = {"CPU": 16.0, "GPU": 8.0}


def lacks(nodes: list[placement.Resources], *overrides: str) -> list[str]:
    return placement.missing(placement.groups(load(list(overrides))), nodes)


@pytest.mark.parametrize(("hardware", "gpus"), [("gpu1", 1.0), ("gpu2", 2.0), ("gpu8", 8.0), ("cluster", 24.0)])
def test_hardware_says_how_many_gpus_are_taken(hardware: str, gpus: float) -> None:
    config = load(["experiment=calc_x", f"hardware={hardware}"])
    assert placement.total(placement.groups(config))["GPU"] == gpus


def test_what_is_missing_is_counted() -> None:
    run = "experiment=calc_x"
    assert lacks([GPU8], run) == []
    assert lacks([{"CPU": 16.0, "GPU": 0.0}], run) == ["needs 8 GPUs, has 0"]
    assert lacks([{"CPU": 2.0, "GPU": 7.0}], run) == ["needs 8 GPUs, has 7", "needs 8 CPUs, has 2"]
    assert lacks([GPU8] * 3, run, "hardware=cluster") == []
    assert lacks([GPU8] * 2, run, "hardware=cluster") == ["needs 24 GPUs, has 16"]


def test_a_learner_that_does_not_fit_onto_one_node_is_told_from_too_few_gpus() -> None:
    halves = [{"CPU": 8.0, "GPU": 4.0}] * 4
    (said,) = lacks(halves, "experiment=calc_x", "learner.processes=8")
    assert said == "learner: no node has 8 CPUs and 8 GPUs free; the cluster has enough, but on several nodes"
    assert lacks(halves, "experiment=calc_x", "learner.processes=8", "learner.nodes=2") == []


def test_engine_and_learner_share_a_gpu() -> None:
    one = {"CPU": 8.0, "GPU": 1.0}
    assert lacks([one], "experiment=calc_x", "hardware=gpu1") == []
    assert lacks([one], "experiment=calc_x", "hardware=gpu1", "algorithm.kl_coef=0.1", "algorithm=ppo") == []
    assert lacks([one], "experiment=calc_x", "hardware=gpu2") == ["needs 2 GPUs, has 1"]


def test_bundles_are_taken_once() -> None:
    asked = [BundleGroup(what="x", number=3, bundles=({"CPU": 2.0},), one_node=False)]
    assert placement.missing(asked, [{"CPU": 4.0}, {"CPU": 2.0}]) == []
    assert placement.missing(asked, [{"CPU": 3.0}, {"CPU": 3.0}])[0].startswith("x: no node has 2 CPUs free")


def test_the_size_of_llama_3_2_3b_from_its_config() -> None:
    size = ModelSize.of(
        {
            "hidden_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 8192,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
        }
    )
    assert size.parameters == 3_212_749_824  # what its model card says
    assert size.kv_values == 57_344
    memory = placement.memory(load(["experiment=calc_x"]), size)
    assert memory.learner == pytest.approx(11.97, abs=0.01)
    assert memory.engine_weights == pytest.approx(5.98, abs=0.01)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_has_a_dry_run(experiment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = examine(load([f"experiment={experiment}", f"runs_dir={tmp_path}"]), assume="1x8")
    out = io.StringIO()
    show(found, Console(file=out, width=200))
    assert f"{experiment}, seed 0: nothing is started" in out.getvalue()
    assert not [line for line in found.missing if line.startswith("cluster")]
    # What is left are data and hubs that are not here.
    assert all(line.startswith(("data.", "model:", "agent:")) for line in found.missing), found.missing
    if experiment in ("toy", "calc_tiny", "calc_team", "calc_sheet"):
        assert found.missing == []


def test_a_dry_run_says_what_a_real_start_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = load(["experiment=calc_tiny", "hardware=gpu8"])
    assert "cluster: needs 8 GPUs, has 0" in examine(config, assume="2x0").missing
    words = ["train", "experiment=calc_tiny", "--dry-run", "--assume", "2x0"]
    assert [main(words), main([*words, "hardware=gpu8"])] == [0, USER_ERROR]
    if not list(Path("/dev").glob("nvidia[0-9]*")):
        with pytest.raises(UserError, match="this machine is too small: needs 8 GPUs, has 0"):
            check_cluster(config, train=True)


@pytest.mark.parametrize("words", [["sampling.seeded=true"], ["serving.gateways=1"], ["serving.gateways=2"]])
def test_no_worker_is_left_without_a_gateway(words: list[str]) -> None:
    config = load(["experiment=toy", *words])
    check_reach(config, 1)
    check_reach(load(["experiment=toy", *words, "serving.host=0.0.0.0"]), 2)
    assert any(line.startswith(f"cluster: {words[0]}") for line in examine(config, assume="2x0").missing)


@pytest.mark.parametrize("text", ["8", "x8", "2x", "twox8"])
def test_a_cluster_that_cannot_be_assumed(text: str) -> None:
    with pytest.raises(ConfigError, match="give NODESxGPUS"):
        assumed(text)


def test_where_each_value_came_from() -> None:
    _, found = sources(["experiment=calc_tiny", "credit=air", "algorithm.lr=1e-3", "sampling.val={top_p: 0.5}"])
    assert found["algorithm.lr"] == (1e-3, "override")
    assert found["sampling.val.top_p"] == (0.5, "override")
    assert found["algorithm.tasks_per_step"] == (32, "conf/experiment/calc_tiny.yaml")
    assert found["credit.method"] == ("return_to_go", "conf/credit/air.yaml")
    assert found["hardware.device"] == ("cpu", "conf/hardware/cpu.yaml")
    assert found["algorithm.epochs"] == (1, "default")
