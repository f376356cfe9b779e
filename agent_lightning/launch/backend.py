"""The engine and the learner of a run: vLLM and veRL, or the toy model. Only `choose` decides which of the two."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from agent_lightning.config.load import Config
from agent_lightning.core.errors import UserError
from agent_lightning.launch import hub, placement
from agent_lightning.launch.placement import BundleGroup, ModelSize, Resources
from agent_lightning.learners.base import Learner

if TYPE_CHECKING:
    from agent_lightning.serving.app import MakeReplica

TOY_CPUS = 0.01
"""CPUs that Ray counts for a replica of the toy model."""


class Backend(Protocol):
    """An engine and a learner: their model, their resources, and their factories."""

    def find_model(self) -> str:
        """The model's folder, downloaded if need be; the name of a model without files. Raises UserError."""
        ...

    def describe_model(self) -> tuple[str, ModelSize | None]:
        """The model in words, and its size if that can be estimated; downloads no weights. Raises UserError."""
        ...

    def check_memory(self) -> None:
        """Raises UserError if the engines cannot fit into the memory that is free on this machine."""
        ...

    def replica_bundles(self) -> tuple[Resources, ...]:
        """The resources of one policy replica; the first bundle holds the replica and its first engine worker."""
        ...

    def groups(self, *, train: bool = True) -> list[BundleGroup]:
        """The placement groups of a run."""
        ...

    def replica(self) -> MakeReplica | None:
        """What makes a policy replica; None: the vLLM replica that the serving configuration describes."""
        ...

    def learner(self, model: str) -> Learner:
        """A new learner of the model in this folder. Raises EngineError."""
        ...


def choose(config: Config) -> Backend:
    """The toy backend for a config with `model.words`, vLLM and veRL for any other."""
    return _Toy(config) if config.model.words else _VllmAndVerl(config)


@dataclass(frozen=True, slots=True)
class _VllmAndVerl:
    config: Config

    def find_model(self) -> str:
        return hub.find_model(self.config.model.path)

    def describe_model(self) -> tuple[str, ModelSize | None]:
        path = self.config.model.path
        try:
            return path, ModelSize.read(hub.read_model_config(path))
        except KeyError as error:
            return f"{path} (its config.json has no {error}; no estimate)", None

    def check_memory(self) -> None:
        """The KV caches must fit in memory; GPUs are measured by vLLM itself."""
        config = self.config
        if config.hardware.device != "cpu":
            return
        import psutil

        available = float(psutil.virtual_memory().available) / placement.GIB
        needed = config.serving.replicas * config.serving.kv_cache_gib
        if needed > available:
            raise UserError(
                f"serving.kv_cache_gib={config.serving.kv_cache_gib} for each of {config.serving.replicas} replicas "
                f"needs {needed} GiB, but {available:.1f} GiB of memory are free: lower it, or serving.replicas"
            )

    def replica_bundles(self) -> tuple[Resources, ...]:
        return placement.engine_bundles(self.config)

    def groups(self, *, train: bool = True) -> list[BundleGroup]:
        learner = [placement.learner_group(self.config)] if train else []
        return [placement.replica_group(self.config, self.replica_bundles()), *learner]

    def replica(self) -> None:
        return None

    def learner(self, model: str) -> Learner:
        from agent_lightning.launch.launch import learner_config
        from agent_lightning.learners.verl import VerlLearner

        return VerlLearner(learner_config(self.config, model))


@dataclass(frozen=True, slots=True)
class _Toy:
    config: Config

    def find_model(self) -> str:
        return self.config.model.path

    def describe_model(self) -> tuple[str, None]:
        return "a toy one", None

    def check_memory(self) -> None:
        return None

    def replica_bundles(self) -> tuple[Resources, ...]:
        return ({"CPU": TOY_CPUS},)

    def groups(self, *, train: bool = True) -> list[BundleGroup]:
        """The toy learner runs in the driver: it has no group."""
        return [placement.replica_group(self.config, self.replica_bundles())]

    def replica(self) -> MakeReplica:
        from agent_lightning.toy.run import ToyReplica

        config = self.config
        rule = config.serving.on_weight_update
        return partial(ToyReplica, tuple(config.model.words), config.seed, config.model.max_len, rule)

    def learner(self, model: str) -> Learner:
        from agent_lightning.toy.model import ToyLanguage
        from agent_lightning.toy.run import SharedToyLearner

        algorithm, temperature = self.config.algorithm, self.config.sampling.train.temperature
        language = ToyLanguage(tuple(self.config.model.words))
        return SharedToyLearner(language, lr=algorithm.lr, clip_ratio=algorithm.clip_ratio_low, temperature=temperature)
