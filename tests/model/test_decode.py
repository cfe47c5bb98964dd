"""Decoding with the key/value cache equals the full forward."""

import pytest
import torch

from internlm.config.rope_section import RopeScaling
from internlm.model.attention import KVCache
from internlm.model.batch import Batch, Segments
from tests.model.tiny import random_model, tiny_config

OPTIONS = [
    {},
    {"qk_norm": True, "qkv_bias": True, "tie_word_embeddings": True, "head_dim": 16},
    {"qk_interleaved": True},
]


def full_logits(model, tokens):
    """[length, vocab] of one document [length]."""
    with torch.no_grad():
        positions = torch.arange(len(tokens))
        return model(Batch(tokens, torch.full_like(tokens, -100), positions, Segments.of((len(tokens),))))


def assert_same(ours, theirs):
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("options", OPTIONS)
def test_token_by_token(options):
    model = random_model(tiny_config(**options))
    tokens = torch.randint(61, (3, 11))
    cache = KVCache(model.config, 3, 11, "cpu", torch.float32)
    steps = [model.decode(tokens[:, i : i + 1], cache) for i in range(11)]
    logits = torch.stack(steps, dim=1)
    assert logits.shape == (3, 11, 61) and not logits.requires_grad
    for row in range(3):
        assert_same(logits[row], full_logits(model, tokens[row]))


def test_prompts_of_different_lengths():
    """Right-padded prompts in one call, then token by token; one row finishes early."""
    model = random_model(tiny_config())
    torch.manual_seed(1)
    rows = [torch.randint(61, (length,)) for length in (2 + 4, 7 + 4, 5 + 2)]
    num_new = torch.tensor([2, 7, 5])
    padded = torch.randint(61, (3, 7))  # padding is any valid id
    for row, (tokens, length) in enumerate(zip(rows, num_new, strict=True)):
        padded[row, :length] = tokens[:length]
    cache = KVCache(model.config, 3, 16, "cpu", torch.float32)
    seen = [[logits] for logits in model.decode(padded, cache, num_new)]
    for step in range(4):
        going = torch.tensor([1, 1, int(step < 2)])
        tokens = torch.stack([rows[row][num_new[row] + step] if going[row] else torch.tensor(0) for row in range(3)])
        logits = model.decode(tokens[:, None], cache, going)
        for row in range(3):
            seen[row] += [logits[row]] if going[row] else []
    assert cache.lengths.tolist() == [6, 11, 7]
    for row in range(3):
        assert_same(torch.stack(seen[row]), full_logits(model, rows[row])[num_new[row] - 1 :])


def test_several_tokens_at_once_after_a_prompt():
    model = random_model(tiny_config())
    tokens = torch.randint(61, (2, 12))
    cache = KVCache(model.config, 2, 12, "cpu", torch.float32)
    logits = torch.stack([model.decode(part, cache) for part in tokens.split((5, 4, 3), dim=1)], dim=1)
    for row in range(2):
        assert_same(logits[row], full_logits(model, tokens[row])[[4, 8, 11]])


def test_a_full_cache_refuses():
    model = random_model(tiny_config())
    cache = KVCache(model.config, 1, 4, "cpu", torch.float32)
    model.decode(torch.zeros(1, 4, dtype=torch.int64), cache)
    with pytest.raises(AssertionError, match="room for 4"):
        model.decode(torch.zeros(1, 1, dtype=torch.int64), cache)


def test_16_bit_cache_and_model():
    model = random_model(tiny_config(dtype="torch.bfloat16"))
    tokens = torch.randint(61, (1, 9))
    cache = KVCache(model.config, 1, 9, "cpu", torch.bfloat16)
    logits = torch.stack([model.decode(tokens[:, i : i + 1], cache) for i in range(9)], dim=1)
    expected = full_logits(model, tokens[0])
    assert (logits[0] - expected).float().norm() / expected.float().norm() < 2e-2


def test_a_long_prompt_makes_one_row_of_logits():
    """At a vocabulary of 100k, 16 prompts of 512 tokens would make 3 GB of logits that nobody reads."""
    model = random_model(tiny_config())
    sizes = []
    model.head.register_forward_hook(lambda module, given, logits: sizes.append(logits.shape))
    model.decode(torch.randint(61, (2, 40)), KVCache(model.config, 2, 40, "cpu", torch.float32))
    assert sizes == [(2, 61)]


@torch.no_grad()
def test_dynamic_scaling_goes_by_the_length_of_each_text():
    scaling = RopeScaling(type="dynamic", factor=2.0)
    model = random_model(tiny_config(max_position_embeddings=8, rope_scaling=scaling))
    rows = [torch.randint(61, (length,)) for length in (20, 5, 11)]
    alone = [full_logits(model, row) for row in rows]
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    tokens = torch.cat(rows)
    packed = model(Batch(tokens, torch.full_like(tokens, -100), positions, Segments.of((20, 5, 11))))
    assert_same(packed, torch.cat(alone))
    plain = random_model(tiny_config())
    assert_same(alone[1], full_logits(plain, rows[1]))  # not longer than 8
    assert (alone[2] - full_logits(plain, rows[2])).abs().max() > 1e-2
    cache = KVCache(model.config, 3, 20, "cpu", torch.float32)
    padded = torch.zeros(3, 20, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        padded[row, : len(tokens)] = tokens
    assert_same(model.decode(padded, cache, torch.tensor([20, 5, 11])), torch.stack([each[-1] for each in alone]))
