"""Tiny models of every preset, for the tests of Hugging Face folders and of generation."""

from typing import Any

from internlm.config.presets import PRESETS
from internlm.config.schema import Config, ModelConfig
from internlm.model.transformer import Transformer
from tests.model.tiny import random_model

SIZES = {
    "num_layers": 2,
    "hidden_size": 48,
    "vocab_size": 67,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "dtype": "torch.float32",
}
# The same in the words of a config.json
SMALL = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SHORT = {"max_position_embeddings": 16}  # exceeded by the tests' texts
# name -> model_type, keys that differ
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "internlm": ("INTERNLM", {}),
    "internlm_tied": ("INTERNLM", {"tie_word_embeddings": True}),
    "internlm2": ("INTERNLM2_PUBLIC", {"num_kv_attention_heads": 2, "rope_base": 1e6}),
    "internlm2_interleaved": ("INTERNLM2_PUBLIC", {"num_kv_attention_heads": 2, "qk_interleaved": True}),
    "internlm2_norm_head": ("INTERNLM2_PUBLIC", {"num_kv_attention_heads": 2, "norm_head": True}),
    "norm_head_tied": ("INTERNLM2_PUBLIC", {"norm_head": True, "tie_word_embeddings": True}),
    "llama2": ("LLAMA2", {"layer_norm_epsilon": 1e-3}),
    "qwen2": ("QWEN2", {"num_kv_attention_heads": 1}),
    "qwen2_tied": ("QWEN2", {"num_kv_attention_heads": 2, "tie_word_embeddings": True, "qk_interleaved": True}),
    "qwen3": ("QWEN3", {"num_kv_attention_heads": 2, "head_dim": 16}),
    "mixtral": ("MIXTRAL", {"num_kv_attention_heads": 2, "num_experts": 4}),
    "qwen3_moe": ("QWEN3_MOE", {"head_dim": 16, "num_experts": 6, "moe": {"top_k": 3, "intermediate_size": 40}}),
    "qwen3_moe_raw": (
        "QWEN3_MOE",
        {"num_experts": 5, "moe": {"top_k": 2, "norm_topk": False}, "tie_word_embeddings": True},
    ),
    "internlm_moe": ("INTERNLM_MoE", {"num_experts": 4, "moe": {"top_k": 2}}),
    "llama3.1": (
        "LLAMA2",
        {
            "num_kv_attention_heads": 2,
            "rope_base": 5e5,
            "rope_scaling": {"type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16},
        },
    ),
    "internlm2_dynamic": ("INTERNLM2_PUBLIC", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, **SHORT}),
    "qwen2_yarn": (
        "QWEN2",
        {
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_linear": ("QWEN3", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "qwen3_tied": ("QWEN3", {"head_dim": 16, "tie_word_embeddings": True, "qk_interleaved": True}),
}


def tiny_run(case: str, **options: Any) -> tuple[Config, Transformer]:
    """The config of a run and its model with random weights (standard deviation 0.2, so that no two logits tie)."""
    model_type, differing = CASES[case]
    model = ModelConfig(**{**PRESETS[model_type], **SIZES, **differing, **options})
    config = Config(model_type=model_type, model=model, data={"seq_len": 64, "total_steps": 1})
    return config, random_model(model)


def named(model: Transformer):  # type: ignore[no-untyped-def]
    """What export_hf asks for."""
    return dict(model.named_parameters()).__getitem__
