"""LoRA's targets and adapters against the files of a model: what does not fit is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from agent_lightning.config.load import load
from agent_lightning.config.running import LoraConfig
from agent_lightning.core.errors import ConfigError
from agent_lightning.launch.adapters import problems

LAYER = "model.layers.0.self_attn.q_proj"


def model(folder: Path, size: int = 8) -> Path:
    folder.mkdir(exist_ok=True)
    tensors = {f"{LAYER}.weight": np.zeros((4, size), np.float32), "model.norm.weight": np.zeros(size, np.float32)}
    save_file(tensors, folder / "model.safetensors")
    return folder


def adapter(folder: Path, *, size: int = 8, layer: str = LAYER, **settings: Any) -> Path:
    folder.mkdir()
    name = f"base_model.model.{layer}"
    tensors = {
        f"{name}.lora_A.weight": np.zeros((2, size), np.float32),
        f"{name}.lora_B.weight": np.zeros((4, 2), np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, **settings}))
    return folder


def lines(tmp_path: Path, **lora: Any) -> list[str]:
    return list(problems(model(tmp_path / "model"), LoraConfig(rank=2, **lora)))


def test_what_fits_has_no_problem(tmp_path: Path) -> None:
    assert lines(tmp_path, targets=("q_proj",), path=str(adapter(tmp_path / "adapter"))) == []
    assert lines(tmp_path, targets=("self_attn.q_proj",)) == []


def test_a_layer_that_the_model_does_not_have_is_named(tmp_path: Path) -> None:
    assert lines(tmp_path, targets=("q_proj", "c_attn")) == [
        "model.lora.targets: the model has no layer c_attn; it has q_proj"
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 16}, "has rank 16; set model.lora.rank=16"),
        ({"size": 16}, f"belongs to another model: {LAYER} of the adapter has 16 inputs, and model.path has 8 inputs"),
        ({"layer": "model.layers.9.mlp.up_proj"}, "belongs to another model: model.layers.9.mlp.up_proj"),
        ({"peft_type": "IA3"}, "is no plain LoRA adapter (IA3)"),
        ({"use_dora": True}, "is no plain LoRA adapter (use_dora)"),
        ({"use_rslora": True}, "is no plain LoRA adapter (use_rslora)"),
        ({"alpha_pattern": {"q_proj": 4}}, "is no plain LoRA adapter (alpha_pattern)"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    path = adapter(tmp_path / "adapter", **settings)
    (line,) = lines(tmp_path, path=str(path))
    assert line.startswith(f"model.lora.path={path}: {message}")


def test_a_damaged_or_missing_adapter_is_refused(tmp_path: Path) -> None:
    (line,) = lines(tmp_path, path=str(tmp_path / "nowhere"))
    assert "no adapter in peft's format" in line
    path = adapter(tmp_path / "adapter")
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:20])
    (line,) = lines(tmp_path, path=str(path))
    assert "cannot be read" in line


@pytest.mark.parametrize("key", ["path=adapter", "dropout=0.1", "targets=[q_proj]"])
def test_keys_that_are_not_read_without_a_rank_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.lora\.\w+.*rank"):
        load(["experiment=calc_tiny", f"model.lora.{key}"])
