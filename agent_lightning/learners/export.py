"""A checkpoint of veRL's as a folder in Hugging Face's format, which Transformers and vLLM load."""

# Why not verl.model_merger: it writes bfloat16 only, and the model's config as the learner had changed it.

from __future__ import annotations

import json
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any, Final

from agent_lightning.config.running import Dtype
from agent_lightning.core.errors import UserError
from agent_lightning.core.text import error_line

_KEPT: Final = (".json", ".model", ".tiktoken", ".txt", ".jinja")
"""Endings of the files that a model has besides its weights: tokenizer, chat template, generation config."""
_REPLACED: Final = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")


def export_model(
    checkpoint: Path, original: Path | None, target: Path, *, dtype: Dtype, shard_size: str, merged: bool = False
) -> int:
    """Write the policy of a checkpoint to the new folder `target`; returns the number of its parameters.

    A checkpoint of LoRA gives the adapter in peft's format, or if `merged` the model with the adapter added. Config,
    tokenizer, chat template and generation config are those of `original`, the folder of the model that the run began
    with; None takes those that the checkpoint has. Weights are converted to `dtype`, and split into files of at
    most `shard_size`, such as "5GB". Raises UserError; then there is no folder `target`.
    """
    if target.exists():
        raise UserError(f"{target} exists: give a folder that is new")
    unfinished = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        weights, adapter = _merge(checkpoint), _read_json(checkpoint / "lora_train_meta.json")
        if adapter and not merged:
            number = _write_adapter(weights, adapter, str(original or ""), unfinished, dtype)
            unfinished.rename(target)
            return number
        if adapter and original is None:
            raise UserError(f"{checkpoint} holds an adapter alone: its base model is needed for --merged")
        if adapter and original is not None:
            weights = _add_adapter(_base_weights(original), weights, adapter)
        model = _load(weights, original or checkpoint / "huggingface", dtype)
        unfinished.mkdir(parents=True)
        model.save_pretrained(unfinished, max_shard_size=shard_size)
        _copy_rest(original or checkpoint / "huggingface", unfinished, dtype)
        unfinished.rename(target)
    except (
        OSError,
        ValueError,
        LookupError,
        ImportError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:  # Transformers' and torch's, for many reasons
        raise UserError(f"{checkpoint} cannot be exported: {error_line(error)}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return int(model.num_parameters())


def _read_json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text())) if file.exists() else {}


def _write_adapter(weights: dict[str, Any], adapter: dict[str, Any], base: str, folder: Path, dtype: Dtype) -> int:
    """Write LoRA's matrices in peft's format; returns the number of their values."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in weights})
    rank, alpha = adapter["r"], adapter["lora_alpha"]
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM", base_model_name_or_path=base
    )
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    tensors = {
        name.replace(".default.weight", ".weight"): tensor.to(vars(torch)[dtype]).contiguous()
        for name, tensor in weights.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def _base_weights(original: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    weights: dict[str, Any] = {}
    for file in sorted(original.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def _add_adapter(base: dict[str, Any], weights: dict[str, Any], adapter: dict[str, Any]) -> dict[str, Any]:
    """W + alpha / r * B A for each matrix that has an adapter, in float32."""
    merged, scale = dict(base), adapter["lora_alpha"] / adapter["r"]
    for name, low in weights.items():
        layer, is_low, _ = name.removeprefix("base_model.model.").partition(".lora_A.")
        if is_low:
            high = weights[name.replace(".lora_A.", ".lora_B.")]
            merged[f"{layer}.weight"] = merged[f"{layer}.weight"].float() + scale * (high @ low)
    return merged


def _load(weights: dict[str, Any], source: Path, dtype: Dtype) -> Any:
    """The model that the config in `source` describes, with these weights."""
    import torch
    from transformers import AutoConfig
    from verl.utils.model import get_hf_auto_model_class

    config = AutoConfig.from_pretrained(source, attn_implementation="eager")
    with torch.device("meta"):
        model = get_hf_auto_model_class(config).from_config(config)
    if config.tie_word_embeddings:  # files have the shared matrix once
        weights.setdefault("lm_head.weight", weights.get("model.embed_tokens.weight"))
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    return model.to(vars(torch)[dtype])


def _merge(checkpoint: Path) -> dict[str, Any]:
    """The weights, tensors by name, put together from the shards of all ranks. Nothing but tensors is unpickled."""
    import torch
    from torch.distributed.tensor import DTensor, Shard

    # It warns that a mesh of processes is read where there are no processes.
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)
    size = json.loads((checkpoint / "fsdp_config.json").read_text())["world_size"]
    files = [checkpoint / f"model_world_size_{size}_rank_{rank}.pt" for rank in range(size)]
    ranks = [torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in files]
    merged: dict[str, Any] = {}
    for name, first in ranks[0].items():
        placement = first.placements[0] if isinstance(first, DTensor) else None
        if not isinstance(placement, Shard):  # each rank has all of it
            merged[name] = first.to_local() if isinstance(first, DTensor) else first
            continue
        merged[name] = torch.cat([shards[name].to_local() for shards in ranks], dim=placement.dim)
    return merged


def _copy_rest(source: Path, target: Path, dtype: Dtype) -> None:
    """Copy all but the weights from `source`. Its config is kept as it is, except for the type of the weights: a newer
    Transformers would write it in a form that older versions of it, and of vLLM, do not read."""
    (target / "generation_config.json").unlink(missing_ok=True)  # made up from the config if the original has none
    for file in source.iterdir():
        if file.suffix in _KEPT and file.name not in _REPLACED:
            shutil.copyfile(file, target / file.name)
    if (templates := source / "additional_chat_templates").is_dir():
        shutil.copytree(templates, target / templates.name)
    config = json.loads((source / "config.json").read_text())
    config.pop("attn_implementation", None)  # of our learner, in checkpoints of earlier versions
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
