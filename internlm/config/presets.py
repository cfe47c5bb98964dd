"""Model families: `model_type` -> values of the `model` section that a config file leaves out.

Data only. What a file says wins over its family; what neither says is the default of the schema. All families are the
same `Transformer`; sizes belong to config files, switches belong here.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # InternLM of 2023: biases on the attention projections alone, its own initial values.
    "INTERNLM": {"qkv_bias": True, "out_bias": True, "init": "internlm", "mlp_ratio": 4.0},
    # The same with experts: GShard's gates as the 2023 framework had them (top_k=1 or 2).
    "INTERNLM_MoE": {
        "qkv_bias": True,
        "out_bias": True,
        "init": "internlm",
        "mlp_ratio": 4.0,
        "moe": {"top_k": 2, "capacity_factor": 1.0, "balance_over": "first"},
    },
    # InternLM2 as published: grouped key/value heads and no bias (sizes in configs/_base_/models).
    "INTERNLM2_PUBLIC": {"mlp_ratio": 4.0},
    "LLAMA2": {"mlp_ratio": 4.0, "max_position_embeddings": 4096},
    # Qwen2 and Qwen3 as in transformers' Qwen2Config, Qwen3Config and the published models.
    "QWEN2": {
        "qkv_bias": True,
        "rope_base": 1e6,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 32768,
    },
    "QWEN3": {
        "qk_norm": True,
        "head_dim": 128,
        "rope_base": 1e6,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 40960,
    },
    # Mixtral and Qwen3-MoE as in transformers' MixtralConfig, Qwen3MoeConfig and the published models: dropless.
    "MIXTRAL": {
        "num_experts": 8,
        "moe": {"top_k": 2},
        "rope_base": 1e6,
        "max_position_embeddings": 32768,
    },
    "QWEN3_MOE": {
        "num_experts": 128,
        "moe": {"top_k": 8},
        "qk_norm": True,
        "head_dim": 128,
        "rope_base": 1e6,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 40960,
    },
}
