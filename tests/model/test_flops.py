"""Counts against the model itself, torch's FLOP counter and published numbers."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from internlm.config.schema import ModelConfig
from internlm.model.flops import (
    flops_per_token,
    model_flops,
    num_active_parameters,
    num_matmul_parameters,
    num_parameters,
)
from internlm.model.transformer import Transformer
from internlm.parallel.recompute import recompute_blocks
from internlm.train.metrics import step_flops
from tests.model.tiny import random_batch, random_model, tiny_config

SWITCHES = [
    {},
    {"qkv_bias": True, "out_bias": True, "num_kv_attention_heads": None},
    {"qk_norm": True, "head_dim": 16, "tie_word_embeddings": True},
    {"num_experts": 4, "moe": {"top_k": 2, "intermediate_size": 40, "num_shared_experts": 2}},
    {"num_experts": 3, "moe": {"top_k": 1, "num_shared_experts": 1, "mix_shared": True}},
]
INTERNLM_7B = ModelConfig(
    num_layers=32, hidden_size=4096, vocab_size=103168, num_attention_heads=32, qkv_bias=True, out_bias=True
)


@pytest.mark.parametrize("options", SWITCHES)
def test_parameters_of_the_model(options):
    config = tiny_config(**options)
    named = dict(Transformer(config).named_parameters())
    assert num_parameters(config) == sum(p.numel() for p in named.values())
    used = config.moe.top_k / config.num_experts  # of the experts
    counted = {name: p.numel() * (used if ".experts." in name else 1) for name, p in named.items()}
    assert num_active_parameters(config) == sum(counted.values())
    matrices = [counted[name] for name, p in named.items() if p.dim() > 1 and not name.endswith(".bias")]
    embedding = named["embedding.weight"].numel()
    assert num_matmul_parameters(config) == sum(matrices) - (0 if config.tie_word_embeddings else embedding)


def test_published_7b():
    """7,321,948,160 parameters, and 44.6 (causal) or 47.8 (full) GFLOP a token at 4k."""
    assert num_parameters(INTERNLM_7B) == 7_321_948_160
    flops = flops_per_token(INTERNLM_7B, 4096)
    assert round(flops.causal / 1e9, 1) == 44.6 and round(flops.full / 1e9, 1) == 47.8


@pytest.mark.parametrize("options", SWITCHES)
@pytest.mark.parametrize("lengths", [(24,), (12, 12), (9, 1, 14)])
def test_equals_torch_flop_counter(options, lengths):
    """torch counts each product that runs; the math kernel multiplies masked scores too: the full convention."""
    config = tiny_config(**options)
    model, batch = random_model(config), random_batch(lengths)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.loss(batch).loss_sum.backward()
    flops = model_flops(config, lengths)
    assert counter.get_total_flops() == flops.full
    recomputed = random_model(config)
    recompute_blocks(recomputed.layers, config.model_copy(update={"checkpoint": "feed_forward"}))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        recomputed.loss(batch).loss_sum.backward()
    again = step_flops(config.model_copy(update={"checkpoint": "feed_forward"}), list(lengths))
    assert counter.get_total_flops() - flops.full == again.hardware - again.causal
    width = config.num_attention_heads * config.head_size
    masked = 6 * config.num_layers * width * sum(length**2 for length in lengths)
    assert flops.full - flops.causal == masked


def test_batches_add_up():
    config = tiny_config()
    parts = [model_flops(config, [5]), model_flops(config, [7, 3])]
    assert model_flops(config, [5, 7, 3]) == tuple(sum(pair) for pair in zip(*parts, strict=True))
    assert flops_per_token(config, 128).full == pytest.approx(model_flops(config, [128] * 4).full / 512)


def test_recompute_does_not_count():
    assert model_flops(tiny_config(checkpoint=True), [8]) == model_flops(tiny_config(), [8])


def test_counter_sees_a_changed_model():
    """The comparison above can fail: without its backward the count is a third."""
    model, batch = random_model(tiny_config()), random_batch((24,))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.loss(batch)
    assert counter.get_total_flops() * 3 == model_flops(model.config, [24]).full
