"""The engine and the learner of a run: vLLM and veRL, or the toy model. Only `choose` decides which of the two."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from agent_lightning.config.load import Config
from agent_lightning.launch import models, placement
from agent_lightning.launch.models import ModelFacts
from agent_lightning.learners.base import Learner

if TYPE_CHECKING:
    from agent_lightning.serving.app import MakeReplica


def list_gpus() -> list[str]:
    """The GPUs that nvidia-smi lists, such as "NVIDIA H200, 143771 MiB"; empty if there is no nvidia-smi, or it does
    not answer."""
    if (command := shutil.which("nvidia-smi")) is None:
        return []
    query = [command, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        reply = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in reply.stdout.splitlines() if line.strip().endswith("MiB")]


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

    def judge_memory(self, memory: placement.Memory) -> str:
        """Whether a run fits into the memory of this machine, as a line."""
        import psutil

        config, engine = self.config, memory.engine_weights + memory.kv_wanted / memory.conversations
        if config.hardware.device == "cpu":
            engines = config.serving.replicas * (memory.engine_weights + config.serving.kv_cache_gib)
            needed, has = config.learner.processes * memory.learner + engines, psutil.virtual_memory().available / 2**30
            tokens = config.serving.kv_cache_gib / memory.kv_per_token
            where = f"of the memory that is free here (a KV cache of {tokens:,.0f} tokens)"
        else:
            needed = memory.learner + engine if config.hardware.placement == "together" else max(memory.learner, engine)
            has, where = min((float(line.split()[-2]) / 1024 for line in list_gpus()), default=0.0), "on each GPU"
        known = f"{has:.1f} GiB: {'fits' if needed <= has else 'does not fit'}" if has else "there is none here"
        return f"needs at least {needed:.2f} GiB {where}, {known}"

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
