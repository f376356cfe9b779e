"""Checks of LoRA's targets, and of the adapter from which training begins, against the files of the model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from agent_lightning.config.load import resolve_path
from agent_lightning.config.running import LoraConfig
from agent_lightning.core.text import error_line

_NOT_PLAIN: Final = ("rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "modules_to_save")
"""Settings of an adapter that is more than W + alpha / rank * B A."""
Shapes = Mapping[str, tuple[int, ...]]
"""The shape of each tensor, by its name."""


def problems(model: Path, lora: LoraConfig) -> Iterator[str]:
    """Why training could not begin with these adapters, a line for each reason. `model` is a folder with weights."""
    shapes = {name: shape for file in sorted(model.glob("*.safetensors")) for name, shape in _shapes(file).items()}
    layers = sorted({name.split(".")[-2] for name, shape in shapes.items() if len(shape) == 2 and "." in name})
    if not isinstance(lora.targets, str):
        unknown = [name for name in lora.targets if shapes and name.split(".")[-1] not in layers]
        if unknown:
            yield f"model.lora.targets: the model has no layer {', '.join(unknown)}; it has {', '.join(layers)}"
    if lora.path is not None:
        yield from (
            f"model.lora.path={lora.path}: {line}"
            for line in _adapter_problems(Path(resolve_path(lora.path)), lora, shapes)
        )


def _adapter_problems(folder: Path, lora: LoraConfig, shapes: Shapes) -> Iterator[str]:
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not (config.is_file() and weights.is_file()):
        yield "no adapter in peft's format (adapter_config.json and adapter_model.safetensors)"
        return
    try:
        settings: dict[str, Any] = dict(json.loads(config.read_text()))
        adapter = _shapes(weights)
    except Exception as error:  # safetensors has its own error, which is no OSError
        yield f"cannot be read: {error_line(error)}"
        return
    if special := [name for name in _NOT_PLAIN if settings.get(name)]:
        yield f"is no plain LoRA adapter ({', '.join(special)})"
    elif settings.get("peft_type") != "LORA":
        yield f"is no plain LoRA adapter ({settings.get('peft_type')})"
    elif settings.get("r") != lora.rank:
        yield f"has rank {settings.get('r')}; set model.lora.rank={settings.get('r')}"
    for name, shape in adapter.items():
        layer, is_low, _ = name.removeprefix("base_model.model.").partition(".lora_A")
        base = shapes.get(f"{layer}.weight")
        if shapes and is_low and (base is None or base[-1] != shape[-1]):
            has = f"{base[-1]} inputs there" if base else "no such layer"
            yield f"belongs to another model: {layer} of the adapter has {shape[-1]} inputs, and model.path has {has}"
            return


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(file, framework="np") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
