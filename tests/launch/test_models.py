"""The reader of a model, and what a start and a dry run refuse: models, and fields of veRL's and vLLM's configs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent_lightning.config.load import load, resolve_path
from agent_lightning.core.errors import UserError
from agent_lightning.launch import models
from agent_lightning.launch.checks import inspect, require

SMALL = ["data.train.num=8", "data.val.num=8"]
TINY = Path(resolve_path("examples/calc_x/tiny_policy"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the tiny policy."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def edit(name: str, **fields: Any) -> Callable[[Path], None]:
    """An edit of a JSON file of a model; None removes a field."""

    def apply(folder: Path) -> None:
        path = folder / name
        values = (json.loads(path.read_text()) if path.exists() else {}) | fields
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return apply


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: next((folder / name).unlink() for name in names)


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")


REFUSED: dict[str, tuple[Callable[[Path], Any], list[str], str]] = {
    "no config": (remove("config.json"), [], "has no config.json"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), [], "config.json is no JSON object"),
    "a list": (lambda folder: (folder / "generation_config.json").write_text("[]"), [], "is no JSON object"),
    "an encoder": (
        edit("config.json", architectures=["BertForMaskedLM"]),
        [],
        "no language model that can be trained .BertForMaskedLM",
    ),
    "no architecture": (edit("config.json", architectures=None), [], "no single class in `architectures`"),
    "two of them": (edit("config.json", architectures=["A", "B"]), [], "no single class in `architectures`"),
    "code of its own": (edit("config.json", auto_map={"AutoModel": "x.Y"}), [], "code of its own .auto_map"),
    "quantised": (edit("config.json", quantization_config={"quant_method": "fp8"}), [], "quantised .fp8.*cannot be"),
    "no tokenizer": (remove("tokenizer.json"), [], "has no tokenizer"),
    "no template": (remove("chat_template.jinja"), [], "no chat template.*model.completions_only=true"),
    "no weights": (remove("model.safetensors"), [], "has no weights"),
    "a shard is missing": (
        edit("model.safetensors.index.json", weight_map={"a": "model-1.safetensors", "b": "model.safetensors"}),
        [],
        "1 of 2 files of weights are missing, such as model-1.safetensors",
    ),
    "cut weights": (cut, [], "no complete safetensors file"),
    "a pointer": (pointer, [], "a pointer of Git LFS"),
    "too long": (lambda folder: None, ["model.max_len=2048"], "positions for 1,024 tokens"),
    "heads": (lambda folder: None, ["serving.tensor_parallel_size=3"], "must divide the model's 5 attention heads"),
    "verl": (lambda folder: None, ["verl.nonsense=1"], "verl.nonsense: no field of verl's FSDPEngineConfig"),
    "verl's type": (lambda folder: None, ["verl.fsdp_size=x"], "verl.fsdp_size=x: must be int"),
    "vllm": (lambda folder: None, ["vllm.block_sze=32"], "did you mean vllm.block_size"),
    "sampling": (lambda folder: None, ["vllm.override_generation_config={top_k: 3}"], "use the keys of sampling"),
    "processors": (lambda folder: None, ["vllm.logits_processors=[a.b]"], "use the keys of sampling"),
    "environment": (lambda folder: None, ["hardware.pass_env=[AGL_NOT_SET]"], "AGL_NOT_SET is not set here"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_start_and_a_dry_run_refuse_in_one_line(name: str, model: Path) -> None:
    change, words, refusal = REFUSED[name]
    change(model)
    config = load(["experiment=calc_tiny", f"model.path={model}", f"runs_dir={model.parent}", *SMALL, *words])
    with pytest.raises(UserError, match=refusal) as refused:
        require(config, "train", "val")
    (line,) = inspect(config).missing
    assert str(refused.value) in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove("chat_template.jinja"), ["model.completions_only=true"]),
        (edit("config.json", rope_scaling={"rope_type": "yarn", "factor": 4.0}), ["model.max_len=4096"]),
        (lambda folder: None, ["vllm={block_size: 32, enable_prefix_caching: true}", "verl.param_offload=true"]),
    ],
)
def test_what_works_is_not_refused(change: Callable[[Path], Any], words: list[str], model: Path) -> None:
    change(model)
    config = load(["experiment=calc_tiny", f"model.path={model}", f"runs_dir={model.parent}", *SMALL, *words])
    assert inspect(config).missing == []


def test_the_facts_of_a_model(model: Path) -> None:
    defaults = {"top_k": 20, "repetition_penalty": 1.1, "eos_token_id": [1, 7]}
    edit("generation_config.json", **defaults)(model)
    facts = models.read(str(model))
    assert (facts.architecture, facts.longest, facts.end_tokens) == ("LlamaForCausalLM", 1024, (1, 7))
    assert (facts.parameters, facts.vocab_size) == (1_598_880, 1024)
    assert str(facts).endswith("end tokens 1, 7, its own top_k=20, repetition_penalty=1.1 not used")
    edit("config.json", text_config={"vocab_size": 9, "max_position_embeddings": 64})(model)
    nested = models.read(str(model))  # the language model is a part of a model that reads images
    assert (nested.vocab_size, nested.longest) == (9, 64)
