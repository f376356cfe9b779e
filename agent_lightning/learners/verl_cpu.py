"""The CPU as a veRL platform, through veRL's registry (entry-point group `verl.plugins`).

It is chosen by `VERL_PLATFORM=cpu`. With `VERL_ENGINE_DEVICE=cuda` veRL then uses its FSDP engine, whose code does not
depend on the device. On a machine with a GPU the platform is registered too, but not chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.cpu
from verl.plugin.platform import PlatformBase, PlatformRegistry


def _constant(value: Any) -> Callable[..., Any]:
    """A function or method that returns the value, whatever its arguments are."""
    return lambda *_, **__: value


class CpuDevice(ModuleType):
    """The functions of `torch.cuda` that veRL calls, for a CPU: one device, whose memory is not counted."""

    def __init__(self) -> None:
        super().__init__("agent_lightning.learners.verl_cpu.device")
        for name in ("synchronize", "stream", "Stream", "current_stream", "is_available", "device_count"):
            setattr(self, name, vars(torch.cpu)[name])
        self.current_device = self.get_device_name = _constant("cpu")
        self.set_device = self.empty_cache = self.ipc_collect = self.reset_peak_memory_stats = _constant(None)
        self.manual_seed = self.manual_seed_all = torch.manual_seed
        self.get_rng_state = torch.get_rng_state
        self.set_rng_state = torch.set_rng_state
        self.memory_allocated = self.memory_reserved = _constant(0)
        self.max_memory_allocated = self.max_memory_reserved = _constant(0)
        self.mem_get_info = _constant((0, 0))


@PlatformRegistry.register(platform="cpu")
class PlatformCpu(PlatformBase):
    """One process, one device called "cpu", collectives over gloo."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = CpuDevice()
    is_available = _constant(True)
    is_platform_available = _constant(False)
    """Asked by veRL's automatic detection, which must prefer a GPU: this platform is chosen by its name only."""
    current_device = _constant("cpu")
    device_count = _constant(1)
    manual_seed = manual_seed_all = staticmethod(torch.manual_seed)
    get_device_capability = _constant((None, None))
    communication_backend_name = _constant("gloo")
    visible_devices_envvar = _constant("CUDA_VISIBLE_DEVICES")
    ray_resource_name = _constant("CPU")
    is_ipc_supported = _constant(False)
    nvtx_range = _constant(nullcontext())
    set_device = synchronize = set_allocator_settings = empty_cache = _constant(None)
    profiler_start = profiler_stop = cudart = _constant(None)

    def ray_noset_envvars(self) -> list[str]:
        return []

    def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
        return {"num_cpus": num_gpus}
