"""What a run asks of a cluster, whether the cluster has it, and how much memory a model takes. Pure.

Example:

    asked = groups(config)      # [BundleGroup("policy replica", 4, ...), BundleGroup("learner", 1, ...)]
    missing(asked, nodes)       # ["needs 8 GPUs, has 0"]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent_lightning.config.schema import Config

Resources = Mapping[str, float]
"""As Ray counts them: {"CPU": 16.0, "GPU": 8.0}."""
LEARNER_SHARE = 0.5
"""Of a GPU that a learner process shares with an engine."""
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleGroup:
    """Placement groups of one kind."""

    what: str
    number: int
    bundles: tuple[Resources, ...]
    """Of each of them."""
    one_node: bool
    """Whether a group's bundles must be on one node."""


def engine_bundles(config: Config) -> tuple[Resources, ...]:
    """The bundles of one vLLM replica; the first holds the replica and its first engine worker."""
    share = 1 - LEARNER_SHARE if config.hardware.placement == "together" else 1.0
    bundle = {"CPU": 1.0} if config.hardware.device == "cpu" else {"CPU": 1.0, "GPU": share}
    return (bundle,) * config.serving.tensor_parallel_size


def learner_roles(config: Config) -> int:
    """How many models a learner process trains or asks: policy, reference, critic."""
    return 1 + (config.algorithm.kl_coef > 0) + (config.credit.method == "gae")


def learner_gpu(config: Config) -> float:
    """Of a GPU, what a learner process takes."""
    if config.hardware.device == "cpu":
        return 0.0
    return LEARNER_SHARE if config.hardware.placement == "together" else 1.0


def replica_group(config: Config, bundles: tuple[Resources, ...]) -> BundleGroup:
    """The placement groups of the policy replicas. Buffer, board, gateways and rollout workers mostly wait and reserve
    nothing; what their agents compute comes on top."""
    return BundleGroup(what="policy replica", number=config.serving.replicas, bundles=bundles, one_node=False)


def learner_group(config: Config) -> BundleGroup:
    """The placement groups of veRL's learner processes, one group on each of its nodes."""
    learner, gpu = config.learner, learner_gpu(config)
    bundle = {"CPU": float(learner_roles(config)) / (gpu or 1.0)} | ({"GPU": gpu} if gpu else {})
    bundles = (bundle,) * (learner.processes // learner.nodes)
    return BundleGroup(what="learner", number=learner.nodes, bundles=bundles, one_node=True)


def total(asked: Sequence[BundleGroup]) -> dict[str, float]:
    """{"CPU": 8.0, "GPU": 8.0} of all groups together."""
    kinds = {kind for group in asked for bundle in group.bundles for kind in bundle}
    return {
        kind: sum(group.number * bundle.get(kind, 0.0) for group in asked for bundle in group.bundles)
        for kind in sorted(kinds)
    }


def missing(asked: Sequence[BundleGroup], nodes: Sequence[Resources]) -> list[str]:
    """What the nodes lack, a line each; empty: they can hold it all. First fit, the groups on one node first."""
    wanted = total(asked)
    has = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in wanted}
    short = [
        f"needs {_count(wanted[k], k)}, has {has[k]:g}" for k in sorted(wanted, reverse=True) if has[k] < wanted[k]
    ]
    if short:
        return short
    free = [dict(node) for node in nodes]
    for group in sorted(asked, key=lambda one: not one.one_node):
        for _ in range(group.number):
            parts = [group.bundles] if group.one_node else [(bundle,) for bundle in group.bundles]
            for part in parts:
                if not _take(part, free):
                    one = {kind: sum(bundle.get(kind, 0.0) for bundle in part) for kind in part[0]}
                    said = " and ".join(_count(number, kind) for kind, number in one.items())
                    return [f"{group.what}: no node has {said} free; the cluster has enough, but on several nodes"]
    return []


def _take(bundles: Sequence[Resources], free: list[dict[str, float]]) -> bool:
    wanted = {kind: sum(bundle.get(kind, 0.0) for bundle in bundles) for kind in bundles[0]}
    for node in free:
        if all(node.get(kind, 0.0) >= number for kind, number in wanted.items()):
            for kind, number in wanted.items():
                node[kind] -= number
            return True
    return False


def _count(number: float, kind: str) -> str:
    return f"{number:g} {kind}{'s' if number != 1 else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """What a model's own config.json says of its size."""

    parameters: int
    kv_values: int
    """Numbers in the KV cache for one token."""

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> ModelSize:
        """The size of a decoder with attention and a gated MLP, such as Llama, Qwen and Mistral, from its config.json;
        an estimate for other models. Raises KeyError for a config without one of the fields.

        Example: Llama-3.2-3B has 3.2e9 parameters and 57,344 values per token.
        """
        hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
        head = config.get("head_dim") or hidden // heads
        kv_heads = config.get("num_key_value_heads") or heads
        attention = hidden * head * (heads + 2 * kv_heads) + heads * head * hidden
        block = attention + 3 * hidden * config["intermediate_size"] + 2 * hidden
        embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
        return cls(parameters=embeddings + layers * block + hidden, kv_values=2 * layers * kv_heads * head)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """An estimate, in GiB. Activations, CUDA graphs and the libraries' own come on top."""

    learner: float
    """Of each process: float32 weights, gradients and Adam's two moments, sharded; the reference's weights too."""
    engine_weights: float
    """Of each GPU (or of the replica on a CPU)."""
    kv_per_token: float
    kv_wanted: float
    """Of each replica, where max_num_seqs conversations of max_len are in it at once; with fewer, some wait."""


def memory(config: Config, size: ModelSize) -> Memory:
    width = 4 if config.model.dtype == "float32" else 2
    trained = 16 * (1 + (config.credit.method == "gae")) + 4 * (config.algorithm.kl_coef > 0)
    per_token = size.kv_values * width / GIB
    return Memory(
        learner=size.parameters * trained / config.learner.processes / GIB,
        engine_weights=size.parameters * width / config.serving.tensor_parallel_size / GIB,
        kv_per_token=per_token,
        kv_wanted=per_token * config.model.max_len * config.serving.max_num_seqs,
    )
