"""Initial values: the table of the reference, and the same value whatever the order."""

from math import sqrt

import pytest
import torch

from internlm.model import init
from internlm.model.init import initial_value, initialize
from internlm.model.transformer import Transformer
from tests.model.tiny import tiny_config

# Large enough for statistics: the error of a std of n values is std / sqrt(2 n).
SIZES = {"hidden_size": 256, "intermediate_size": 320, "vocab_size": 512, "num_layers": 3}

INTERNLM = {
    "embedding.weight": 0.0052,
    "head.weight": 0.0052,
    "layers.0.attention.wqkv.weight": 0.006,
    "layers.0.attention.wo.weight": 0.006 / sqrt(2),
    "layers.2.attention.wo.weight": 0.006 / sqrt(6),
    "layers.2.attention.wqkv.weight": 0.006,
    "layers.2.feed_forward.w13.weight": 0.006,
    "layers.2.feed_forward.w2.weight": 0.006 / sqrt(6),
}
STDS = {
    "embedding_init_std": 0.01,
    "attn_wqkv_init_std": 0.02,
    "attn_other_init_std": 0.03,
    "ffn_uplayer_init_std": 0.04,
    "ffn_other_init_std": 0.05,
    "out_head_init_std": 0.06,
}
INTERNLM2 = {
    "embedding.weight": 0.01,
    "head.weight": 0.06,
    "layers.1.attention.wqkv.weight": 0.02,
    "layers.1.attention.wo.weight": 0.03 / 2,
    "layers.1.feed_forward.w13.weight": 0.04,
    "layers.1.feed_forward.w2.weight": 0.05 / 2,
}


def values(config, seed=7):
    shapes = {name: tuple(p.shape) for name, p in Transformer(config).named_parameters()}
    return {name: initial_value(name, shape, config, seed) for name, shape in shapes.items()}


def assert_stds(named, expected, uniform=False):
    for name, std in expected.items():
        value = named[name]
        error = 5 / sqrt(2 * value.numel())
        assert abs(value.std().item() / std - 1) < error, name
        assert abs(value.mean().item()) < 5 * std / sqrt(value.numel()), name
        largest = value.abs().max().item() / std
        assert (largest <= sqrt(3) + 1e-4) if uniform else (3 < largest < 7), name


def test_internlm_table():
    named = values(tiny_config(init="internlm", qkv_bias=True, out_bias=True, **SIZES))
    assert_stds(named, INTERNLM)
    for name, value in named.items():
        if name.endswith("norm.weight"):
            assert torch.equal(value, torch.ones_like(value))
        if name.endswith(".bias"):
            assert torch.equal(value, torch.zeros_like(value))


def test_experts_start_as_dense_layers_do():
    moe = {"intermediate_size": 64, "num_shared_experts": 1, "mix_shared": True}
    named = values(tiny_config(init="internlm", num_experts=16, moe=moe, **SIZES))
    expected = {"experts.w13": 0.006, "experts.w2": 0.006 / sqrt(6), "shared.w13.weight": 0.006}
    expected |= {"shared.w2.weight": 0.006 / sqrt(6), "router.weight": 0.006}
    assert_stds(named, {f"layers.2.feed_forward.{name}": std for name, std in expected.items()})
    assert not named["layers.2.feed_forward.mix.bias"].any()


def test_internlm_unscaled():
    named = values(tiny_config(init="internlm", use_scaled_init=False, **SIZES))
    assert_stds(named, {"layers.2.attention.wo.weight": 0.0015, "layers.2.feed_forward.w2.weight": 0.0015})


@pytest.mark.parametrize("init_type", ["normal", "uniform"])
def test_internlm2_table(init_type):
    named = values(tiny_config(init="internlm2", init_type=init_type, **STDS, **SIZES))
    assert_stds(named, INTERNLM2, uniform=init_type == "uniform")


def test_internlm2_unscaled():
    named = values(tiny_config(init="internlm2", use_scaled_init=False, **STDS, **SIZES))
    assert_stds(named, {"layers.1.attention.wo.weight": 0.03, "layers.1.feed_forward.w2.weight": 0.05})


def test_pure_function_of_name_and_seed(monkeypatch):
    monkeypatch.setattr(init, "_PIECE", 1000)  # several pieces, hence several threads
    config = tiny_config(**SIZES)
    shapes = {name: tuple(p.shape) for name, p in Transformer(config).named_parameters()}
    forward = {name: initial_value(name, shape, config, 3) for name, shape in shapes.items()}
    torch.manual_seed(99)
    state = torch.get_rng_state()
    backward = {name: initial_value(name, shapes[name], config, 3) for name in reversed(shapes)}
    assert all(torch.equal(forward[name], backward[name]) for name in shapes)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [name for name in shapes if not name.endswith("norm.weight")]
    flat = [forward[name].flatten()[:100] / forward[name].std() for name in weights]
    flat += [initial_value(name, shapes[name], config, 4).flatten()[:100] / forward[name].std() for name in weights]
    correlation = torch.corrcoef(torch.stack(flat)).fill_diagonal_(0)
    assert correlation.abs().max() < 0.6  # other names and other seeds are other numbers
    pieces = forward["embedding.weight"].flatten().split(1000)[:100]
    assert torch.corrcoef(torch.stack(pieces)).fill_diagonal_(0).abs().max() < 0.3


def test_initialize_fills_a_model():
    config = tiny_config(dtype="torch.bfloat16", tie_word_embeddings=True, qk_norm=True)
    model = Transformer(config)
    initialize(model, config, 5)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, initial_value(name, tuple(parameter.shape), config, 5).bfloat16()), name


def test_unknown_name_is_refused():
    with pytest.raises(AssertionError, match="no rule"):
        initial_value("layers.0.mystery.weight", (4, 4), tiny_config(), 0)
