"""What a run needs of a cluster, and what a cluster lacks."""

from __future__ import annotations

import pytest

from agent_lightning.config.load import load
from agent_lightning.config.reference import sources
from agent_lightning.launch import backend, placement
from agent_lightning.launch.placement import BundleGroup, ModelSize

GPU8 = {"CPU": 16.0, "GPU": 8.0}


def lacks(nodes: list[placement.Resources], *overrides: str) -> list[str]:
    return placement.missing(backend.choose(load(list(overrides))).groups(), nodes)


@pytest.mark.parametrize(("hardware", "gpus"), [("gpu1", 1.0), ("gpu2", 2.0), ("gpu8", 8.0), ("cluster", 24.0)])
def test_hardware_decides_how_many_gpus_are_reserved(hardware: str, gpus: float) -> None:
    config = load(["experiment=calc_x", f"hardware={hardware}"])
    assert placement.total(backend.choose(config).groups())["GPU"] == gpus


def test_missing_resources_are_counted() -> None:
    run = "experiment=calc_x"
    assert lacks([GPU8], run) == []
    assert lacks([{"CPU": 16.0, "GPU": 0.0}], run) == ["needs 8 GPUs, has 0"]
    assert lacks([{"CPU": 2.0, "GPU": 7.0}], run) == ["needs 8 GPUs, has 7", "needs 8 CPUs, has 2"]
    assert lacks([GPU8] * 3, run, "hardware=cluster") == []
    assert lacks([GPU8] * 2, run, "hardware=cluster") == ["needs 24 GPUs, has 16"]


def test_too_few_gpus_on_each_node_is_another_message_than_too_few_gpus() -> None:
    halves = [{"CPU": 8.0, "GPU": 4.0}] * 4
    (line,) = lacks(halves, "experiment=calc_x", "learner.processes=8")
    assert line == "learner: no node has 8 CPUs and 8 GPUs free; the cluster has enough, but on several nodes"
    assert lacks(halves, "experiment=calc_x", "learner.processes=8", "learner.nodes=2") == []


def test_engine_and_learner_share_a_gpu() -> None:
    node = {"CPU": 8.0, "GPU": 1.0}
    assert lacks([node], "experiment=calc_x", "hardware=gpu1") == []
    assert lacks([node], "experiment=calc_x", "hardware=gpu1", "algorithm.kl_coef=0.1", "algorithm=ppo") == []
    assert lacks([node], "experiment=calc_x", "hardware=gpu2") == ["needs 2 GPUs, has 1"]


def test_bundles_are_taken_once() -> None:
    groups = [BundleGroup(what="x", number=3, bundles=({"CPU": 2.0},), one_node=False)]
    assert placement.missing(groups, [{"CPU": 4.0}, {"CPU": 2.0}]) == []
    assert placement.missing(groups, [{"CPU": 3.0}, {"CPU": 3.0}])[0].startswith("x: no node has 2 CPUs free")


def test_the_size_of_llama_3_2_3b_from_its_config() -> None:
    size = ModelSize.read(
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
    assert size.parameters == 3_212_749_824  # as its model card has it
    assert size.kv_values == 57_344
    memory = placement.memory(load(["experiment=calc_x"]), size)
    assert memory.learner == pytest.approx(11.97, abs=0.01)
    assert memory.engine_weights == pytest.approx(5.98, abs=0.01)


def test_where_each_value_came_from() -> None:
    _, values = sources(["experiment=calc_tiny", "credit=air", "algorithm.lr=1e-3", "sampling.val={top_p: 0.5}"])
    assert values["algorithm.lr"] == (1e-3, "override")
    assert values["sampling.val.top_p"] == (0.5, "override")
    assert values["algorithm.tasks_per_step"] == (32, "conf/experiment/calc_tiny.yaml")
    assert values["credit.method"] == ("return_to_go", "conf/credit/air.yaml")
    assert values["hardware.device"] == ("cpu", "conf/hardware/cpu.yaml")
    assert values["algorithm.epochs"] == (1, "default")
