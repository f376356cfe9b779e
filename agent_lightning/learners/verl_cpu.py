"""The CPU as a veRL platform, through veRL's registry (entry-point group `verl.plugins`).

It is chosen by `VERL_PLATFORM=cpu`. With `VERL_ENGINE_DEVICE=cuda` veRL then uses its FSDP engine, whose code does not
depend on the device. On a machine with a GPU the platform is registered too, but not chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.cpu
from verl.plugin.platform import PlatformBase, PlatformRegistry


class CpuDevice(ModuleType):
    """The functions of `torch.cuda` that veRL calls, for a CPU: one device, whose memory is not counted."""

    def __init__(self) -> None:
        super().__init__("agent_lightning.learners.verl_cpu.device")
        for name in ("synchronize", "stream", "Stream", "current_stream", "is_available", "device_count"):
            setattr(self, name, vars(torch.cpu)[name])
        self.current_device = self.get_device_name = _cpu
        self.set_device = self.empty_cache = self.ipc_collect = self.reset_peak_memory_stats = _nothing
        self.manual_seed = self.manual_seed_all = torch.manual_seed
        self.get_rng_state = torch.get_rng_state
        self.set_rng_state = torch.set_rng_state
        self.memory_allocated = self.memory_reserved = self.max_memory_allocated = self.max_memory_reserved = _zero
        self.mem_get_info = lambda *_: (0, 0)


def _nothing(*_: object, **__: object) -> None:
    return None


def _zero(*_: object) -> int:
    return 0


def _cpu(*_: object) -> str:
    return "cpu"


@PlatformRegistry.register(platform="cpu")
class PlatformCpu(PlatformBase):
    """One process, one device called "cpu", collectives over gloo."""

    device_name = "cpu"
    vendor_name = "cpu"
    current_device = _cpu
    set_device = synchronize = set_allocator_settings = empty_cache = profiler_start = profiler_stop = cudart = _nothing

    def __init__(self) -> None:
        self._device = CpuDevice()

    @property
    def device_module(self) -> ModuleType:
        return self._device

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        # Automatic detection must prefer a GPU; this platform is chosen by its name only.
        return False

    def device_count(self) -> int:
        return 1

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
        return {"num_cpus": num_gpus}

    def is_ipc_supported(self) -> bool:
        return False
