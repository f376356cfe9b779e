"""The engine and the learner of a run: vLLM and veRL, or the toy model. Only `choose` decides which of the two."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from agent_lightning.config.load import Config
from agent_lightning.launch import models, placement
from agent_lightning.launch.models import ModelFacts
from agent_lightning.learners.base import Learner

if TYPE_CHECKING:
    from agent_lightning.serving.app import MakeReplica


def choose(config: Config) -> Backend:
    """The toy backend for a config with `model.words`, vLLM and veRL for any other."""
    return ToyBackend(config) if config.model.words else Backend(config)


@dataclass(frozen=True)
class Backend:
    """vLLM and veRL: their model, their resources, and their factories."""

    config: Config

    def read_model(self) -> ModelFacts | None:
        """What the model's files say; None for a model without files. Downloads no weights. Raises UserError."""
        return models.read(self.config.model.path, self.config.model.commit)

    def check_memory(self) -> None:
        """Raises UserError if the KV caches do not fit into the free memory of a CPU; vLLM itself measures GPUs."""
        import psutil

        if self.config.hardware.device == "cpu":
            self.config.serving.check_memory(psutil.virtual_memory().available / placement.GIB)

    def replica_bundles(self) -> tuple[placement.Resources, ...]:
        """The resources of one policy replica; the first bundle holds the replica and its first engine worker."""
        return placement.engine_bundles(self.config)

    def groups(self, *, train: bool = True, serve: bool = True) -> list[placement.BundleGroup]:
        """The placement groups of a run that trains or serves, or both."""
        learner = [placement.learner_group(self.config)] if train else []
        return [placement.replica_group(self.config, self.replica_bundles())] * serve + learner

    def replica(self) -> MakeReplica | None:
        """The maker of a policy replica; None: the vLLM replica that the serving configuration describes."""
        return None

    def learner(self, model: str, revision: str | None) -> Learner:
        """A new learner of the model in this folder, or of this commit of the hub. Raises UserError."""
        from agent_lightning.launch.launch import training
        from agent_lightning.learners.verl import VerlLearner

        return VerlLearner(training(self.config, model, revision))


class ToyBackend(Backend):
    """The toy model, whose learner runs in the driver: it has no files and reserves next to nothing."""

    def read_model(self) -> None:
        return None

    def check_memory(self) -> None:
        return None

    def replica_bundles(self) -> tuple[placement.Resources, ...]:
        return ({"CPU": 0.01},)

    def groups(self, *, train: bool = True, serve: bool = True) -> list[placement.BundleGroup]:
        return super().groups(train=False)

    def replica(self) -> MakeReplica:
        from agent_lightning.testing.run import ToyReplica

        model = self.config.model
        return partial(ToyReplica, tuple(model.words), self.config.seed, model.max_len, self.config.serving)

    def learner(self, model: str, revision: str | None) -> Learner:
        from agent_lightning.testing.model import ToyLanguage
        from agent_lightning.testing.run import SharedToyLearner

        algorithm, temperature = self.config.algorithm, self.config.sampling.train.temperature
        language = ToyLanguage(tuple(self.config.model.words))
        return SharedToyLearner(language, lr=algorithm.lr, clip_ratio=algorithm.clip_ratio_low, temperature=temperature)
