"""config.json of a Hugging Face folder, from and to the model section of a config."""

from typing import Any

from pydantic import ValidationError

from internlm.checkpoint.hf_rope import refuse_two_ropes, rope_of, rope_scaling_of
from internlm.config.schema import ModelConfig
from internlm.utils.errors import UserError
from internlm.utils.logger import get_logger

logger = get_logger(__name__)

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "internlm": "InternLMForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
    "internlm3": "InternLM3ForCausalLM",
}
_PREFIXES = {"internlm": "InternLM", "internlm2": "InternLM2", "internlm3": "InternLM3"}  # of the remote-code classes
_GRANITE_FACTORS = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# What a key that config.json leaves out means to transformers 5, where that isn't what it means for Llama.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
    "qwen3_moe": {"num_key_value_heads": 4, "max_position_embeddings": 32768},
    "mixtral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
}
# What a reader may set otherwise without loading a different set of weights.
_FREE = ("rope_base", "rope_scaling", "max_position_embeddings")


def config_json(layout: str, model: ModelConfig, dtype: str, tied: bool, special_ids: dict[str, Any]) -> dict[str, Any]:
    """The file for an export in `layout` with tensors of `dtype` ("float16").

    `special_ids` holds bos_token_id, eos_token_id and pad_token_id. Rotary and dtype fields are written under the
    names of transformers 5 and under the older ones that other engines read.
    """
    return {
        "architectures": [_CLASSES[layout]],
        "model_type": layout,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": 0.02,
        "rms_norm_eps": model.layer_norm_epsilon,
        "tie_word_embeddings": tied,
        "use_cache": True,
        **special_ids,
        **_layout_fields(layout, model),
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _layout_fields(layout: str, model: ModelConfig) -> dict[str, Any]:
    """Fields that only one family reads."""
    scaling = model.rope_scaling.spelled_out() if model.rope_scaling is not None else None
    # Engines that are older than the key rope_type call it type.
    older = None if scaling is None else {"type": scaling["rope_type"], **scaling}
    theta = {"rope_theta": model.rope_base, "rope_scaling": older}
    if layout == "internlm":
        # "origin": plain rotary at any length, as trained; the published default "dynamic" changes long positions.
        rotary = {"base": model.rope_base, "type": "origin"}
        if model.rope_scaling is not None:
            rotary |= {"type": "dynamic", "scaling_factor": model.rope_scaling.factor}
        return {"bias": model.qkv_bias, "rotary": rotary, "auto_map": _auto_map(layout)}
    if layout == "internlm2":
        return {"bias": model.qkv_bias, **theta, "attn_implementation": "eager", "auto_map": _auto_map(layout)}
    common = {
        "head_dim": model.head_size,
        "attention_dropout": 0.0,
        **theta,
        "rope_parameters": {"rope_theta": model.rope_base, **(scaling or {"rope_type": "default"})},
    }
    if layout == "internlm3":
        biases = {"qkv_bias": model.qkv_bias, "bias": False}  # the latter of the output and feed-forward projections
        return {**common, **biases, "auto_map": _auto_map(layout)}
    if layout == "qwen2":
        return {**common, "use_sliding_window": False}
    if layout == "mixtral":
        experts = {"num_local_experts": model.num_experts, "num_experts_per_tok": model.moe.top_k}
        return {**common, **experts, "intermediate_size": model.expert_size, "sliding_window": None}
    if layout == "granitemoe":
        experts = {"num_local_experts": model.num_experts, "num_experts_per_tok": model.moe.top_k}
        factors = {**_GRANITE_FACTORS, "attention_multiplier": model.head_size**-0.5}
        biases = {"attention_bias": model.qkv_bias}
        return {**common, **experts, **factors, **biases, "intermediate_size": model.expert_size}
    if layout in ("qwen3", "qwen3_moe"):
        experts = _qwen3_experts(model) if layout == "qwen3_moe" else {}
        return {**common, **experts, "use_sliding_window": False, "attention_bias": model.qkv_bias}
    return {**common, "attention_bias": model.qkv_bias, "mlp_bias": False}


def _qwen3_experts(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_experts": model.num_experts,
        "num_experts_per_tok": model.moe.top_k,
        "moe_intermediate_size": model.expert_size,
        "norm_topk_prob": model.moe.normalises,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _experts(hf: dict[str, Any], layout: str) -> dict[str, Any]:
    """The keys of the model section that describe experts."""
    if layout not in ("mixtral", "qwen3_moe", "granitemoe"):
        return {}
    of_qwen = layout == "qwen3_moe"
    moe = {
        "top_k": hf.get("num_experts_per_tok", 8 if of_qwen else 2),
        "intermediate_size": hf.get("moe_intermediate_size", 768) if of_qwen else hf["intermediate_size"],
        "norm_topk": hf.get("norm_topk_prob", False) if of_qwen else True,
    }
    return {"num_experts": hf.get("num_experts", hf.get("num_local_experts", 128 if of_qwen else 8)), "moe": moe}


def _has_usual_scores(hf: dict[str, Any]) -> bool:
    """Whether Granite's factor of the scores is 1 / sqrt(head_dim), to the digits that JSON keeps."""
    head_dim = hf.get("head_dim") or hf["hidden_size"] / hf["num_attention_heads"]
    return abs(hf.get("attention_multiplier", 1.0) * head_dim**0.5 - 1) < 1e-6


def _auto_map(layout: str) -> dict[str, str]:
    model_class = f"modeling_{layout}.{_CLASSES[layout]}"
    return {
        "AutoConfig": f"configuration_{layout}.{_PREFIXES[layout]}Config",
        "AutoModel": model_class,  # the published examples load with AutoModel
        "AutoModelForCausalLM": model_class,
    }


def model_section(hf: dict[str, Any], file: str) -> dict[str, Any]:
    """The keys of `ModelConfig` that a config.json fixes. `file` is its name in messages.

    Raises UserError for a family or a switch that `Transformer` lacks.
    """
    layout = hf.get("model_type")
    if layout not in _CLASSES:
        raise UserError(f"{file}: model_type={layout!r} is not supported; supported are {', '.join(_CLASSES)}")
    hf = {**_DEFAULTS.get(layout, {}), **hf}
    for key in ("rope_parameters", "rope_scaling", "rotary"):
        if not isinstance(hf.get(key) or {}, dict):
            raise UserError(f"{file}: {key}={hf[key]!r} is no object with a type and its values")
    if missing := [key for key in _SIZES if hf.get(key) is None]:
        raise UserError(f"{file}: {', '.join(missing)} missing; this is not the config.json of a whole model")
    if wrong := [f"{key}={hf[key]!r}" for key in _SIZES if type(hf[key]) is not int or hf[key] < 1]:
        raise UserError(f"{file} does not describe a model: {', '.join(wrong)}; these are positive whole numbers")
    _refuse_unknown_switches(hf, file)
    refuse_two_ropes(hf, file)
    if unheeded := [f"{key}={hf[key]}" for key in ("attention_dropout", "router_jitter_noise") if hf.get(key)]:
        logger.warning(f"{file}: {', '.join(unheeded)}: training here goes without")
    if layout == "internlm3" and hf.get("bias", False):
        raise UserError(f"{file}: bias=True puts biases on the feed-forward layers, which our Transformer lacks")
    heads = hf["num_attention_heads"]
    kv_heads = hf.get("num_key_value_heads") or heads
    if isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads:
        raise UserError(f"{file}: num_attention_heads={heads} is not divisible by num_key_value_heads={kv_heads}")
    bias = hf.get("bias", True) if layout in ("internlm", "internlm2") else hf.get("attention_bias", False)
    qkv_bias = {"qwen2": True, "internlm3": hf.get("qkv_bias", False)}.get(layout, bias)
    theta = rope_of(hf)["rope_theta"]
    return {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "vocab_size": hf["vocab_size"],
        "num_attention_heads": heads,
        "num_kv_attention_heads": kv_heads,
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
        "intermediate_size": hf["intermediate_size"],
        "max_position_embeddings": hf.get("max_position_embeddings", 2048),
        "rope_base": float(theta) if type(theta) is int else theta,
        "rope_scaling": rope_scaling_of(hf, file),
        "layer_norm_epsilon": hf.get("rms_norm_eps", 1e-6),
        "qkv_bias": qkv_bias,
        "out_bias": False if layout in ("qwen2", "internlm3") else bias,
        "qk_norm": layout in ("qwen3", "qwen3_moe"),
        "tie_word_embeddings": hf.get("tie_word_embeddings", False),
        **_experts(hf, layout),
    }


def model_of(section: dict[str, Any], file: str) -> ModelConfig:
    """The model that a `model_section` describes; raises UserError naming the values that can't be."""
    try:
        return ModelConfig(**section)
    except ValidationError as error:
        reasons = [f"{'.'.join(map(str, part['loc']))} = {part['input']!r}: {part['msg']}" for part in error.errors()]
        raise UserError(f"{file} does not describe a model: {'; '.join(reasons)}") from error


def preset_of(hf: dict[str, Any]) -> str:
    """The model_type whose preset comes nearest."""
    if hf["model_type"] == "llama":
        return "INTERNLM" if hf.get("attention_bias") else "LLAMA2"
    return {
        "internlm": "INTERNLM",
        "internlm2": "INTERNLM2_PUBLIC",
        "internlm3": "INTERNLM2_PUBLIC",
        "qwen2": "QWEN2",
        "qwen3": "QWEN3",
        "mixtral": "MIXTRAL",
        "granitemoe": "INTERNLM_MoE",
        "qwen3_moe": "QWEN3_MOE",
    }[hf["model_type"]]


def check_same(model: ModelConfig, found: dict[str, Any], file: str) -> None:
    """Raise UserError with both values for every key in which the user's model differs from the folder's."""
    ours = {
        **model.model_dump(),
        "num_kv_attention_heads": model.num_kv_heads,
        "head_dim": model.head_size,
        "intermediate_size": model.ffn_size,
        "moe.top_k": model.moe.top_k,
        "moe.intermediate_size": model.expert_size,
        "moe.norm_topk": model.moe.normalises,
    }
    found = {**found, **{f"moe.{key}": value for key, value in found.get("moe", {}).items()}}
    if found.pop("moe", None):  # experts have the width of moe.intermediate_size, and no layer is dense
        del found["intermediate_size"]
    elif model.num_experts > 1:
        found["num_experts"] = 1
    differing = {key: value for key, value in found.items() if ours[key] != value}
    for key in [key for key in differing if key in _FREE]:
        logger.warning(f"model.{key} is {ours[key]}, {file} says {differing.pop(key)}: the config's value is used")
    if differing:
        lines = [f"  model.{key} is {ours[key]}, the folder has {value}" for key, value in differing.items()]
        raise UserError(
            "\n".join([f"the config does not describe the model in {file}:", *lines, "set these keys alike"])
        )


def _refuse_unknown_switches(hf: dict[str, Any], file: str) -> None:
    rope = rope_of(hf)
    wrong = {
        "hidden_act": hf.get("hidden_act", "silu") != "silu",
        "mlp_bias": hf.get("mlp_bias", False),
        "use_sliding_window": hf.get("use_sliding_window", False),
        "layer_types": any(kind != "full_attention" for kind in hf.get("layer_types") or []),
        "per_layer_config": bool(hf.get("per_layer_config")),
        "rotary": (hf.get("rotary") or {}).get("type", "dynamic") not in ("origin", "dynamic"),
        "is_causal": not hf.get("is_causal", True),
        "rope_parameters": any(isinstance(value, dict) for value in rope.values()),  # one for each type of layer
        "sliding_window": hf["model_type"] == "mixtral" and hf.get("sliding_window") is not None,
        "decoder_sparse_step": hf.get("decoder_sparse_step", 1) != 1,
        "mlp_only_layers": bool(hf.get("mlp_only_layers")),
        **{key: hf.get(key, 1.0) != 1.0 for key in _GRANITE_FACTORS},
        "attention_multiplier": hf["model_type"] == "granitemoe" and not _has_usual_scores(hf),
        "quantization_config": hf.get("quantization_config") is not None,
        "partial_rotary_factor": rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1)) != 1,
    }
    found = [f"{key}={hf.get(key, rope.get(key, 'missing'))}" for key, is_wrong in wrong.items() if is_wrong]
    if found:
        raise UserError(f"{file}: {', '.join(found)} is not supported by our Transformer; choose another model")
