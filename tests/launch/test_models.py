"""The reader of a model, and what a start and a dry run refuse: models, and fields of veRL's and vLLM's configs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent_lightning.api.cli.main import main
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
    "recurrent": (edit("config.json", layer_types=["conv", "full_attention"]), [], "no float32 kernel .*conv"),
    "latent attention": (edit("config.json", kv_lora_rank=32), [], "latent attention .kv_lora_rank. is inexact"),
    "a longrope": (
        edit("config.json", rope_parameters={"rope_type": "longrope", "original_max_position_embeddings": 64}),
        [],
        "model.max_len=512: vLLM stretches longrope .* at most 64 tokens",
    ),
    "dynamic rope": (
        edit("config.json", rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
        ["model.max_len=2048"],
        "model.max_len=2048: vLLM stretches dynamic .* at most 1,024 tokens",
    ),
    "images": (edit("config.json", vision_config={"depth": 1}), [], "no preprocessor_config.json"),
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
        (edit("config.json", layer_types=["attention"] * 2, mamba_d_state=8), []),  # without such a layer
        (edit("config.json", rope_parameters={"rope_type": "dynamic", "factor": 2.0}), ["model.max_len=1024"]),
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
    assert str(facts).endswith("end tokens: 1 7, its own top_k=20, repetition_penalty=1.1 not used")
    edit("config.json", text_config={"vocab_size": 9, "max_position_embeddings": 64})(model)
    nested = models.read(str(model))  # the language model is a part of a model that reads images
    assert (nested.vocab_size, nested.longest) == (9, 64)


def test_a_dry_run_says_whether_the_memory_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    """Needed are the learner (16 bytes a parameter), the engine's weights (4) and a KV cache of 1 GiB."""
    assert main(["train", "experiment=calc_tiny", "--dry-run", *SMALL]) == 0
    plan = " ".join(capsys.readouterr().out.split())
    assert "needs at least 1.03 GiB of the memory that is free here (a KV cache of 209,715 tokens)" in plan
    assert "GiB: fits" in plan


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        ([str(TINY)], 0, ["LlamaForCausalLM", "1.6M parameters", "1,024 positions", "chat template: yes", "fits"]),
        ([f"model.path={TINY}", "model.max_len=2048"], 1, ["end tokens: 1", "positions for 1,024 tokens"]),
        (["experiment=calc_tiny"], 0, ["tokenizer: tokenizer.json", "1 files of weights, 0.01 GiB"]),
        (["no/such/folder"], 2, ["model.path=no/such/folder: no such folder"]),
        (["experiment=toy"], 2, ["the toy has no files to read"]),
    ],
)
def test_the_doctor_reads_a_model(
    words: list[str], code: int, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *words]) == code
    shown = "".join(capsys.readouterr())
    assert [text for text in expected if text not in shown] == []


YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"rope_parameters": YARN}, {}),  # both take 0.1 ln(factor) + 1
        ({"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}, {"attn_factor": 0.78293}),
        ({"rope_parameters": YARN | {"attention_factor": 1.5}}, {"attn_factor": 1.17439}),
        ({"rope_scaling": YARN | {"attention_factor": 1.5}, "rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "kv_lora_rank": 32}, {}),
        ({"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}}, {"beta": 0.1}),
        ({"architectures": ["Cohere2ForCausalLM"], "sliding_window": 64}, {"sliding_window": 63}),
        ({"architectures": ["DeepseekV3ForCausalLM"]}, {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}),
    ],
)
def test_vllm_is_told_what_it_reads_otherwise(fields: dict[str, Any], expected: dict[str, Any], model: Path) -> None:
    edit("config.json", **fields)(model)
    overrides = models.read(str(model)).engine_overrides
    given = overrides | overrides.get("rope_parameters", {}) | overrides.get("llama_4_scaling", {})
    for name, value in expected.items():
        assert given[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4))
    assert bool(overrides) == bool(expected)


def test_the_overrides_of_a_nested_config(model: Path) -> None:
    text = json.loads((model / "config.json").read_text()) | {"rope_parameters": YARN | {"attention_factor": 2.0}}
    edit("config.json", text_config=text)(model)
    assert list(models.read(str(model)).engine_overrides["text_config"]) == ["rope_parameters"]
