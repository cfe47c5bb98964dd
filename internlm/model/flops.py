"""Parameter counts and model FLOPs: what the mathematics needs, never what an implementation recomputes.

A matrix of N weights costs 2 N FLOP a token forward and 4 N backward. Attention of a segment of s tokens costs, per
layer and per element of the query width (heads * head_dim), 2 s^2 for the scores and 2 s^2 for the values forward,
twice that backward: 12 s^2. That is the *full* convention, which most published figures use. Half of the scores are
masked in causal attention: the *causal* convention counts 6 s^2. HFU, which counts
recomputation as well, is in train/metrics.py.
"""

from collections.abc import Iterable
from typing import NamedTuple

from internlm.config.schema import ModelConfig


class Flops(NamedTuple):
    """Forward and backward model FLOPs in both conventions."""

    causal: float
    full: float


def num_matmul_parameters(config: ModelConfig) -> int:
    """Weights that a token is multiplied with: the head counts (tied or not), the embedding's look-up does not, nor do
    experts that compute other tokens."""
    hidden, size = config.hidden_size, config.head_size
    wqkv = hidden * config.num_kv_heads * (config.q_per_kv + 2) * size
    wo = hidden * config.num_attention_heads * size
    feed_forward = 3 * hidden * config.ffn_size
    if config.num_experts > 1:
        num_used = config.moe.top_k + config.moe.num_shared_experts
        feed_forward = 3 * hidden * config.expert_size * num_used
        feed_forward += hidden * (config.num_experts + 2 * config.moe.mix_shared)
    return config.num_layers * (wqkv + wo + feed_forward) + config.vocab_size * hidden


def num_parameters(config: ModelConfig) -> int:
    """All parameters of the model, tied ones once."""
    unused = 3 * config.hidden_size * config.expert_size * (config.num_experts - config.moe.top_k)
    return num_active_parameters(config) + (config.num_layers * unused if config.num_experts > 1 else 0)


def num_active_parameters(config: ModelConfig) -> int:
    """Parameters that one token uses; without experts, all of them."""
    hidden, size = config.hidden_size, config.head_size
    per_layer = 2 * hidden  # norms
    per_layer += config.qkv_bias * config.num_kv_heads * (config.q_per_kv + 2) * size
    per_layer += config.out_bias * hidden + config.qk_norm * 2 * size
    per_layer += 2 * config.moe.mix_shared if config.num_experts > 1 else 0
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * hidden
    return num_matmul_parameters(config) + config.num_layers * per_layer + hidden + embedding


def model_flops(config: ModelConfig, lengths: Iterable[int]) -> Flops:
    """FLOPs of forward and backward over segments of the given lengths, such as `batch.segments.lengths`."""
    lengths = list(lengths)
    matmul = 6.0 * num_matmul_parameters(config) * sum(lengths)
    query_width = config.num_attention_heads * config.head_size
    causal = 6.0 * config.num_layers * query_width * sum(length**2 for length in lengths)
    return Flops(matmul + causal, matmul + 2 * causal)


def flops_per_token(config: ModelConfig, seq_len: int) -> Flops:
    """FLOPs of forward and backward per token of a segment of `seq_len`."""
    causal, full = model_flops(config, [seq_len])
    return Flops(causal / seq_len, full / seq_len)
