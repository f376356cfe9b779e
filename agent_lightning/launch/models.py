"""What a model's own files say, without its weights: one reader for the dry run, the start and `agl doctor`.

facts = read("Qwen/Qwen2.5-1.5B-Instruct")  # or a folder; of a model on the hub, small files alone are downloaded
facts.architecture, facts.longest           # ("Qwen2ForCausalLM", 32768)
problems(facts, config)                     # ["model.max_len=65536: the model has positions for 32,768 tokens"]
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from agent_lightning.config.load import Config
from agent_lightning.core.errors import UserError
from agent_lightning.launch import hub, placement

_TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "vocab.txt", "spiece.model")
_LENGTHS: Final = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")
_SAMPLING: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
_TRAINABLE: Final = ("ForCausalLM", "ForConditionalGeneration")
_INDEX: Final = "model.safetensors.index.json"
_RECURRENT_LAYERS: Final = frozenset(("conv", "linear_attention", "mamba", "recurrent"))
_RECURRENT_FIELDS: Final = frozenset(("mamba_d_state", "state_size", "linear_conv_kernel_dim", "conv_L_cache"))
"""Fields of models with such layers, for a config.json without `layer_types`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A model in Hugging Face format."""

    location: str
    """The absolute path of its folder, or its hub id, which each node resolves by itself."""
    revision: str | None = None
    """The commit of a model on the hub, the same for every node; None for a folder."""
    config: Mapping[str, Any]
    """config.json."""
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    """tokenizer_config.json."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """generation_config.json. Its end tokens hold; its sampling parameters do not, as the config has them."""
    index: Mapping[str, Any] = field(default_factory=dict)
    """model.safetensors.index.json."""
    files: Mapping[str, int] = field(default_factory=dict)
    """The size of each file in bytes, by its name."""
    parameters: int | None = None
    """The number of parameters that the files of a folder hold; None if they are not here."""
    faults: tuple[str, ...] = ()
    """What is wrong with files of weights."""

    @property
    def text(self) -> Mapping[str, Any]:
        """The config of the language model, which is a part of config.json if the model reads images too."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, Mapping) else self.config

    @property
    def architecture(self) -> str:
        """The model's class, such as "LlamaForCausalLM"; "" if config.json does not name one."""
        names = self.config.get("architectures") or []
        return str(names[0]) if len(names) == 1 else ""

    @property
    def longest(self) -> int | None:
        """The most tokens that the model has positions for; None if config.json does not say."""
        known = [int(self.text[name]) for name in _LENGTHS if self.text.get(name)]
        return math.ceil(max(known) * max(1.0, float(self.rope.get("factor") or 1.0))) if known else None

    @property
    def rope(self) -> Mapping[str, Any]:
        """How rotary position embeddings are scaled, with `rope_type`; empty if config.json does not say."""
        rope = self.text.get("rope_scaling") or self.text.get("rope_parameters") or {}
        return {"rope_type": rope.get("type"), "rope_theta": self.text.get("rope_theta"), **rope} if rope else {}

    @property
    def engine_overrides(self) -> dict[str, Any]:
        """Fields of config.json that vLLM is given with other values, since it reads them otherwise than Transformers
        does, with which the policy is trained. Each is an entry of the table in tests/stack/test_architectures.py."""
        rope, changed = self.rope, dict[str, Any]()
        if self.architecture == "Cohere2ForCausalLM" and (window := self.text.get("sliding_window")):
            changed["sliding_window"] = window - 1  # vLLM adds the token itself to the window
        if self.architecture == "DeepseekV3ForCausalLM":  # Transformers has no others
            changed |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
        if rope.get("rope_type") == "yarn" and "kv_lora_rank" not in self.text:  # vLLM has its own yarn for those
            scale, of_query, of_all = map(rope.get, ("attention_factor", "mscale", "mscale_all_dim"))
            growth = 0.1 * math.log(max(1.0, float(rope["factor"])))
            if scale is None and of_query and of_all:
                scale = (growth * of_query + 1) / (growth * of_all + 1)
            if scale is not None:  # vLLM reads none of the three
                changed["rope_parameters"] = {**rope, "attn_factor": scale / (growth + 1)}
        if beta := rope.get("llama_4_scaling_beta"):
            original = rope["original_max_position_embeddings"]
            changed["llama_4_scaling"] = {"beta": beta, "original_max_position_embeddings": original}
        return changed if self.text is self.config or not changed else {"text_config": changed}

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary; 2**31 if config.json does not give it."""
        return int(self.text.get("vocab_size") or 2**31)

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokens that end a reply."""
        ids = self.generation.get("eos_token_id", self.text.get("eos_token_id"))
        return tuple(ids) if isinstance(ids, list) else () if ids is None else (int(ids),)

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return bool(self.tokenizer.get("chat_template")) or any("chat_template" in name for name in self.files)

    @property
    def size(self) -> placement.ModelSize | None:
        """The size of the model; None if config.json does not give it."""
        try:
            return placement.ModelSize.read(self.text, self.parameters)
        except (KeyError, TypeError):
            return None

    def lines(self) -> Iterator[str]:
        """What the files say, a line for each thing."""
        size = self.size
        weights = [size_bytes for name, size_bytes in self.files.items() if name.endswith((".safetensors", ".bin"))]
        ignored = [f"{name}={self.generation[name]}" for name in _SAMPLING if self.generation.get(name) is not None]
        yield f"{self.location}{f' at {self.revision}' if self.revision else ''}"
        yield self.architecture or "no architecture"
        yield f"{size.parameters / 1e6:,.1f}M parameters" if size else "an unknown number of parameters"
        yield f"{len(weights)} files of weights, {sum(weights) / placement.GIB:.2f} GiB"
        yield f"{self.longest:,} positions" if self.longest else "positions without a limit"
        yield f"tokenizer: {next((name for name in _TOKENIZERS if name in self.files), 'none')}"
        yield f"chat template: {'yes' if self.has_template else 'none'}"
        yield f"end tokens: {' '.join(map(str, self.end_tokens)) or 'none'}"
        if ignored:
            yield f"its own {', '.join(ignored)} not used"

    def __str__(self) -> str:
        return ", ".join(self.lines())


def read(path: str, revision: str | None = None) -> ModelFacts:
    """Read the files of a model: a folder or a hub id. Raises UserError if it is neither, or a file is no JSON."""
    if hub.is_on_hub(path):
        revision, files, fetch = hub.look_up(path, revision)
        return ModelFacts(location=path, revision=revision, files=files, **_parts(path, files, fetch))
    folder = Path(hub.local_folder(path))
    files = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    parameters, faults = 0, []
    for name in sorted(files):
        if name.endswith(".safetensors"):
            try:
                parameters += _count_parameters(folder / name)
            except (ValueError, KeyError, TypeError) as error:
                faults.append(f"{folder / name}: {error}; get the file again")
    parts = _parts(path, files, lambda name: folder / name)
    return ModelFacts(location=str(folder), files=files, parameters=parameters or None, faults=tuple(faults), **parts)


def _parts(path: str, files: Mapping[str, int], fetch: Callable[[str], Path]) -> dict[str, Any]:
    names = {
        "config": "config.json",
        "tokenizer": "tokenizer_config.json",
        "generation": "generation_config.json",
        "index": _INDEX,
    }
    parts: dict[str, Any] = {"config": {}}
    for part, name in names.items():
        if name in files:
            try:
                parts[part] = json.loads(fetch(name).read_text(encoding="utf-8"))
                parts[part].keys()
            except (ValueError, AttributeError) as error:
                raise UserError(f"model.path={path}: {name} is no JSON object; get the file again") from error
    return parts


def _count_parameters(file: Path) -> int:
    """The number of values in a safetensors file, from its header. Raises ValueError if the file is not complete."""
    with file.open("rb") as opened:
        start = opened.read(8)
        if start == b"version ":
            raise ValueError("a pointer of Git LFS, not the weights (git lfs pull)")
        length = int.from_bytes(start, "little")
        if length > file.stat().st_size:
            raise ValueError("no complete safetensors file")
        tensors = json.loads(opened.read(length))
    tensors.pop("__metadata__", None)
    if file.stat().st_size != 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0):
        raise ValueError("no complete safetensors file")
    return sum(math.prod(tensor["shape"]) for tensor in tensors.values())


def problems(facts: ModelFacts, config: Config) -> Iterator[str]:
    """Why a run with this model could not work, a line for each reason."""
    path, text, model = f"model.path={config.model.path}", facts.text, config.model
    if "config.json" not in facts.files:
        yield f"{path}: has no config.json; point to a model in Hugging Face format"
        return
    if not facts.architecture.endswith(_TRAINABLE):
        kind = facts.architecture or "no single class in `architectures` of its config.json"
        yield f"{path}: is no language model that can be trained ({kind}); choose a ...ForCausalLM"
    if facts.config.get("auto_map"):
        yield f"{path}: runs code of its own (auto_map in config.json), which is not run here; choose another model"
    if quantised := facts.config.get("quantization_config"):
        method = quantised.get("quant_method", "quantised") if isinstance(quantised, Mapping) else "quantised"
        yield f"{path}: its weights are quantised ({method}), which cannot be trained; choose the unquantised model"
    if not any(name in facts.files for name in _TOKENIZERS):
        yield f"{path}: has no tokenizer (tokenizer.json); copy that of the model it was made from"
    elif not facts.has_template and not model.completions_only:
        yield (
            f"{path}: its tokenizer has no chat template, so that every chat would fail; add chat_template.jinja, or "
            "set model.completions_only=true for an agent that uses v1/completions alone"
        )
    shards = set((facts.index.get("weight_map") or {}).values())
    if lost := sorted(shards - facts.files.keys()):
        yield f"{path}: {len(lost)} of {len(shards)} files of weights are missing, such as {lost[0]}"
    elif not any(name.endswith((".safetensors", ".bin")) for name in facts.files):
        yield f"{path}: has no weights (model.safetensors)"
    yield from (f"{path}: {fault}" for fault in facts.faults)
    if facts.longest is not None and model.max_len > facts.longest:
        yield f"model.max_len={model.max_len}: the model has positions for {facts.longest:,} tokens"
    heads, parallel = text.get("num_attention_heads"), len(placement.engine_bundles(config))
    if isinstance(heads, int) and heads % parallel:
        yield f"serving.tensor_parallel_size={parallel}: must divide the model's {heads} attention heads"


def engine_problems(facts: ModelFacts, config: Config) -> Iterator[str]:
    """Why vLLM cannot serve the model, or computes other log-probabilities than Transformers does."""
    path, rope = f"model.path={config.model.path}", facts.rope
    original = rope.get("original_max_position_embeddings") or facts.text.get("original_max_position_embeddings")
    limits = {"dynamic": facts.text.get("max_position_embeddings"), "longrope": original, "su": original}
    if (limit := limits.get(rope.get("rope_type", ""))) and config.model.max_len > limit:
        yield (
            f"model.max_len={config.model.max_len}: vLLM stretches {rope['rope_type']} rotary embeddings by max_len, "
            f"and Transformers by each row's length; at most {limit:,} tokens are exact"
        )
    kinds = facts.text.get("layer_types")
    recurrent = _RECURRENT_LAYERS.intersection(kinds) if kinds else _RECURRENT_FIELDS.intersection(facts.text)
    if recurrent and config.hardware.device == "cpu" and config.model.dtype == "float32":
        yield (
            f"{path}: on a CPU vLLM has no float32 kernel for its convolutional or recurrent layers "
            f"({min(recurrent)}); choose a GPU (hardware=), or another model"
        )
    if "kv_lora_rank" in facts.text and config.hardware.device == "cpu":
        yield f"{path}: vLLM's latent attention (kv_lora_rank) is inexact on a CPU; choose a GPU (hardware=)"
    if "vision_config" in facts.config and not any("processor_config.json" in name for name in facts.files):
        yield f"{path}: has no preprocessor_config.json, without which vLLM does not load a model that reads images"
