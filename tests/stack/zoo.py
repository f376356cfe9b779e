"""Random models of many architectures, a few thousand parameters each, in Hugging Face format."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch

from agent_lightning.config.load import resolve_path

_DENSE: Final[dict[str, Any]] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
_HEADS: Final[dict[str, Any]] = {"head_dim": 32}  # the smallest that vLLM has on a CPU
_MAMBA: Final[dict[str, Any]] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
_EXPERTS: Final[dict[str, Any]] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_YARN: Final[dict[str, Any]] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_TEXT_VL: Final[dict[str, Any]] = {
    **_DENSE,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
}

ARCHITECTURES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "Llama": ("llama", _DENSE),
    "Llama, yarn": ("llama", _DENSE | {"rope_parameters": _YARN}),
    "Llama, dynamic rope": (
        "llama",
        _DENSE | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "Llama, tied": ("llama", _DENSE | {"tie_word_embeddings": True}),
    "Mistral, sliding window": ("mistral", _DENSE | _HEADS | {"sliding_window": 8}),
    "Mixtral": ("mixtral", _DENSE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Ministral": ("ministral", _DENSE | _HEADS | {"sliding_window": 8}),
    "Ministral 3": ("ministral3", _DENSE | _HEADS | {"rope_parameters": _YARN | {"llama_4_scaling_beta": 0.5}}),
    "Qwen2": ("qwen2", _DENSE),
    "Qwen2-MoE": ("qwen2_moe", _DENSE | _EXPERTS | {"shared_expert_intermediate_size": 32}),
    "Qwen3": ("qwen3", _DENSE | _HEADS),
    "Qwen3-MoE": ("qwen3_moe", _DENSE | _HEADS | _EXPERTS),
    "Qwen3-Next": (
        "qwen3_next",
        _DENSE
        | _EXPERTS
        | {
            "head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_conv_kernel_dim": 4,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "Gemma 2": ("gemma2", _DENSE | _HEADS | {"sliding_window": 8, "query_pre_attn_scalar": 32}),
    "Gemma 3": ("gemma3_text", _DENSE | _HEADS | {"sliding_window": 8, "query_pre_attn_scalar": 32}),
    "Phi-3": ("phi3", _DENSE),
    "Phi-3, longrope": (
        "phi3",
        _DENSE
        | {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 16,
                "long_factor": [2.0] * 16,
            },
        },
    ),
    "OLMo 2": ("olmo2", _DENSE),
    "OLMo 3": ("olmo3", _DENSE | {"sliding_window": 8}),
    "SmolLM3": ("smollm3", _DENSE | {"no_rope_layers": [1, 0]}),
    "Granite": ("granite", _DENSE | {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0}),
    "Granite-MoE-Hybrid": (
        "granitemoehybrid",
        _DENSE
        | _MAMBA
        | {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
            "logits_scaling": 4.0,
            "position_embedding_type": "rope",
        },
    ),
    "Granite-MoE-Hybrid, attention": (
        "granitemoehybrid",
        _DENSE
        | _MAMBA
        | {"layer_types": ["attention", "attention"], "shared_intermediate_size": 32, "num_local_experts": 0},
    ),
    "LFM2": (
        "lfm2",
        _DENSE
        | {
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
            "conv_dim": 64,
            "block_dim": 64,
        },
    ),
    "Mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "conv_kernel": 4, "expand": 2}),
    "Mamba 2": (
        "mamba2",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "state_size": 16,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 1,
            "chunk_size": 16,
        },
    ),
    "Bamba": ("bamba", _DENSE | _MAMBA | {"attn_layer_indices": [1]}),
    "Falcon-H1": ("falcon_h1", _DENSE | _MAMBA | {"mamba_d_ssm": 128, "lm_head_multiplier": 0.5}),
    "DeepSeek-V3": (
        "deepseek_v3",
        _DENSE
        | {
            "num_key_value_heads": 2,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 512,
            "q_lora_rank": 32,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 64,
            "v_head_dim": 32,
        },
    ),
    "GPT-NeoX": ("gpt_neox", _DENSE),
    "GPT-2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "GPT-OSS": ("gpt_oss", _DENSE | _HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    "Cohere 2": ("cohere2", _DENSE | {"sliding_window": 8, "logit_scale": 0.25}),
    "GLM-4": ("glm4", _DENSE | _HEADS),
    "EXAONE 4": ("exaone4", _DENSE | {"sliding_window": 8, "sliding_window_pattern": 2}),
    "Qwen2.5-VL": (
        "qwen2_5_vl",
        {
            "text_config": _TEXT_VL,
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "num_heads": 2,
                "intermediate_size": 32,
                "out_hidden_size": 64,
            },
        },
    ),
    "Qwen3-VL": (
        "qwen3_vl",
        {
            "text_config": _TEXT_VL | _HEADS,
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "num_heads": 2,
                "intermediate_size": 32,
                "out_hidden_size": 64,
                "deepstack_visual_indexes": [0],
            },
        },
    ),
}


def make(name: str, folder: Path, *, seed: int = 0) -> None:
    """Save a random model of an architecture to `folder`, with the tiny policy's tokenizer and chat template."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_path("examples/calc_x/tiny_policy"))
    kind, fields = ARCHITECTURES[name]
    tokens = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.2,
    }
    if "text_config" in fields:
        config = AutoConfig.for_model(kind, **{**fields, "text_config": fields["text_config"] | tokens})
    else:
        config = AutoConfig.for_model(kind, **fields, **tokens)
    torch.manual_seed(seed)
    kinds = AutoModelForImageTextToText if "text_config" in fields else AutoModelForCausalLM
    model = kinds.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
