"""Logits and gradients equal to transformers' Llama, Qwen2 and Qwen3 with the same tiny random weights."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from internlm.config.schema import ModelConfig
from internlm.model.transformer import Transformer
from tests.model.tiny import random_batch, random_model, tiny_config

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}, {}),
    "llama_mha_bias": (
        LlamaConfig,
        LlamaForCausalLM,
        {"attention_bias": True},
        {"qkv_bias": True, "out_bias": True, "num_kv_attention_heads": None},
    ),
    "llama_gqa_bias": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True}, {"qkv_bias": True, "out_bias": True}),
    "llama_mqa_tied": (LlamaConfig, LlamaForCausalLM, {}, {"num_kv_attention_heads": 1, "tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}, {"qkv_bias": True, "rope_base": 1e6, "layer_norm_epsilon": 1e-6}),
    "qwen2_tied": (Qwen2Config, Qwen2ForCausalLM, {}, {"qkv_bias": True, "tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}, {"qk_norm": True, "head_dim": 16, "layer_norm_epsilon": 1e-6}),
    "qwen3_tied": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {},
        {"qk_norm": True, "head_dim": 16, "tie_word_embeddings": True, "rope_base": 1e6},
    ),
}


def build(family: str) -> tuple[Transformer, PreTrainedModel]:
    hf_config, hf_class, hf_options, options = FAMILIES[family]
    ours = random_model(tiny_config(**options))
    config = ours.config
    if hf_config is not LlamaConfig or config.head_dim:
        hf_options = {**hf_options, "head_dim": config.head_size}
    theirs = hf_class(
        hf_config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_kv_heads,
            rms_norm_eps=config.layer_norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            tie_word_embeddings=config.tie_word_embeddings,
            attn_implementation="eager",
            **hf_options,
        )
    ).eval()
    missing, unexpected = theirs.load_state_dict(as_hf(dict(ours.named_parameters()), config), strict=False)
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set()) and not unexpected
    return ours, theirs


def as_hf(named: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our parameters (or gradients) under transformers' names."""
    result = {"model.embed_tokens.weight": named["embedding.weight"], "model.norm.weight": named["head.norm.weight"]}
    if "head.weight" in named:
        result["lm_head.weight"] = named["head.weight"]
    groups = config.q_per_kv
    for i in range(config.num_layers):
        layer = {name.removeprefix(f"layers.{i}."): p for name, p in named.items() if name.startswith(f"layers.{i}.")}
        to = f"model.layers.{i}"
        for kind in ("weight", "bias"):
            if f"attention.wqkv.{kind}" in layer:
                wqkv = layer[f"attention.wqkv.{kind}"]
                result[f"{to}.self_attn.q_proj.{kind}"] = wqkv[:, :groups].flatten(0, 2)
                result[f"{to}.self_attn.k_proj.{kind}"] = wqkv[:, groups].flatten(0, 1)
                result[f"{to}.self_attn.v_proj.{kind}"] = wqkv[:, groups + 1].flatten(0, 1)
            if f"attention.wo.{kind}" in layer:
                result[f"{to}.self_attn.o_proj.{kind}"] = layer[f"attention.wo.{kind}"]
        for name in ("q_norm", "k_norm"):
            if f"attention.{name}.weight" in layer:
                result[f"{to}.self_attn.{name}.weight"] = layer[f"attention.{name}.weight"]
        result[f"{to}.mlp.gate_proj.weight"], result[f"{to}.mlp.up_proj.weight"] = layer["feed_forward.w13.weight"]
        result[f"{to}.mlp.down_proj.weight"] = layer["feed_forward.w2.weight"]
        result[f"{to}.input_layernorm.weight"] = layer["attention_norm.weight"]
        result[f"{to}.post_attention_layernorm.weight"] = layer["ffn_norm.weight"]
    return result


@pytest.mark.parametrize("lengths", [(20,), (10, 10), (1, 12, 5, 1, 1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family, lengths):
    """A packed row of ours equals each document alone in transformers."""
    ours, theirs = build(family)
    batch = random_batch(lengths)
    with torch.no_grad():
        expected = torch.cat([theirs(tokens[None]).logits[0] for tokens in batch.tokens.split(lengths)])
        logits = ours(batch)
    assert expected.std() > 0.5
    assert (logits - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama_gqa_bias", "qwen3_tied"])
def test_loss_and_gradients(family):
    ours, theirs = build(family)
    lengths = (9, 1, 14)
    batch = random_batch(lengths)
    logits = torch.cat([theirs(tokens[None]).logits[0] for tokens in batch.tokens.split(lengths)])
    expected = F.cross_entropy(logits, batch.labels, reduction="sum")
    expected.backward()
    loss = ours.loss(batch).loss_sum
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    grads = as_hf({name: p.grad for name, p in ours.named_parameters()}, ours.config)
    named = dict(theirs.named_parameters())
    assert grads.keys() == named.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, named[name].grad, rtol=1e-4, atol=1e-5 * named[name].grad.abs().max().item())
