"""The resources that a run reserves, what a cluster lacks of them, and the memory of a model. Pure functions.

groups = [replica_group(config, engine_bundles(config)), learner_group(config)]
missing(groups, nodes)  # ["needs 8 GPUs, has 0"]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent_lightning.config.schema import Config

Resources = Mapping[str, float]  # as Ray counts them: {"CPU": 16.0, "GPU": 8.0}
LEARNER_SHARE = 0.5  # the share of a GPU that a learner process has if an engine has the rest
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleGroup:
    """`number` placement groups of Ray with the same bundles."""

    what: str
    number: int
    bundles: tuple[Resources, ...]  # the bundles of each group
    one_node: bool  # whether all bundles of a group must be on the same node


def engine_bundles(config: Config) -> tuple[Resources, ...]:
    """The bundles of one vLLM replica; the first holds the replica and its first engine worker."""
    share = 1 - LEARNER_SHARE if config.hardware.placement == "together" else 1.0
    bundle = {"CPU": 1.0} if config.hardware.device == "cpu" else {"CPU": 1.0, "GPU": share}
    return (bundle,) * config.serving.tensor_parallel_size


def learner_gpu(config: Config) -> float:
    """The share of a GPU that a learner process reserves."""
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
    # Each process holds the policy, with a KL term the reference, and with GAE the critic.
    own_reference = config.algorithm.has_reference and not config.model.lora.rank
    models = 1.0 + own_reference + (config.credit.method == "gae")
    bundle = {"CPU": models / (gpu or 1.0)} | ({"GPU": gpu} if gpu else {})
    bundles = (bundle,) * (learner.processes // learner.nodes)
    return BundleGroup(what="learner", number=learner.nodes, bundles=bundles, one_node=True)


def total(groups: Sequence[BundleGroup]) -> dict[str, float]:
    """The resources of all groups together: {"CPU": 8.0, "GPU": 8.0}."""
    return _sum([bundle for group in groups for bundle in group.bundles * group.number])


def _sum(bundles: Sequence[Resources]) -> dict[str, float]:
    kinds = sorted({kind for bundle in bundles for kind in bundle})
    return {kind: sum(bundle.get(kind, 0.0) for bundle in bundles) for kind in kinds}


def missing(groups: Sequence[BundleGroup], nodes: Sequence[Resources]) -> list[str]:
    """What the nodes lack, a line for each kind of resource; empty if the groups fit. The groups are placed first fit,
    those that need a node for themselves first."""
    needed = total(groups)
    has = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in needed}
    short = [
        f"needs {_count(needed[k], k)}, has {has[k]:g}" for k in sorted(needed, reverse=True) if has[k] < needed[k]
    ]
    if short:
        return short
    free = [dict(node) for node in nodes]
    for group in sorted(groups, key=lambda group: not group.one_node):
        parts = [group.bundles] if group.one_node else [(bundle,) for bundle in group.bundles]
        for amounts in map(_sum, parts * group.number):
            fitting = (node for node in free if all(node.get(kind, 0.0) >= amounts[kind] for kind in amounts))
            node = next(fitting, None)
            if node is None:
                lacking = " and ".join(_count(number, kind) for kind, number in amounts.items())
                return [f"{group.what}: no node has {lacking} free; the cluster has enough, but on several nodes"]
            for kind, number in amounts.items():
                node[kind] -= number
    return []


def _count(number: float, kind: str) -> str:
    return f"{number:g} {kind}{'s' if number != 1 else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """The size of a model."""

    parameters: int
    kv_values: int  # values in the KV cache for each token

    @classmethod
    def read(cls, config: Mapping[str, Any], parameters: int | None = None) -> ModelSize:
        """The size of a decoder with attention and a gated MLP, such as Llama, Qwen and Mistral, from its config.json;
        an estimate for other models. `parameters`: their number if it is known. Raises KeyError for a config without
        one of the fields.
        Example: Llama-3.2-3B has 3.2e9 parameters and 57,344 values per token."""
        hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
        head = config.get("head_dim") or hidden // heads
        kv_heads = config.get("num_key_value_heads") or heads
        kinds = [kind for kind in config.get("layer_types") or () if "attention" in kind and kind != "linear_attention"]
        kv_values = 2 * (len(kinds) or layers) * kv_heads * head
        if parameters is not None:
            return cls(parameters=parameters, kv_values=kv_values)
        attention = hidden * head * (heads + 2 * kv_heads) + heads * head * hidden
        block = attention + 3 * hidden * config["intermediate_size"] + 2 * hidden
        embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
        return cls(parameters=embeddings + layers * block + hidden, kv_values=kv_values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The estimated memory of a run in GiB, without activations, CUDA graphs and what the libraries need."""

    learner: float
    """For each learner process: its shard of float32 weights, gradients, Adam's two moments and the reference."""
    engine_weights: float  # for each GPU of a replica, or for a replica on a CPU
    kv_per_token: float
    conversations: int  # the most conversations that a replica samples at a time
    kv_wanted: float
    """For each replica with so many conversations of max_len at once; with less KV cache, some have to wait."""


def memory(config: Config, size: ModelSize) -> Memory:
    """Estimate the memory of a run that trains a model of this size."""
    width = 4 if config.model.dtype == "float32" else 2
    # LoRA has no gradients and moments but those of its adapters, about a hundredth; its reference is the base itself.
    policy = 4 if config.model.lora.rank else 16 + 4 * config.algorithm.has_reference
    trained = policy + 16 * (config.credit.method == "gae")
    per_token = size.kv_values * width / GIB
    return Memory(
        learner=size.parameters * trained / config.learner.processes / GIB,
        engine_weights=size.parameters * width / config.serving.tensor_parallel_size / GIB,
        kv_per_token=per_token,
        conversations=config.serving.max_num_seqs,
        kv_wanted=per_token * config.model.max_len * config.serving.max_num_seqs,
    )
