"""The mixture of experts against sums written out per token, and its router's losses against their definitions."""

from math import ceil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from internlm.config.schema import ModelConfig
from internlm.model.attention import KVCache
from internlm.model.moe import MoE, RowPart
from internlm.model.transformer import Transformer
from tests.model.tiny import random_batch, random_model, tiny_config

SWITCHES: list[dict[str, Any]] = [
    {"top_k": 2},
    {"top_k": 1},
    {"top_k": 1, "norm_topk": True},
    {"top_k": 3, "norm_topk": False},
    {"top_k": 2, "score": "sigmoid"},
    {"top_k": 2, "score": "sigmoid", "bias_rate": 0.1},
    {"top_k": 2, "num_shared_experts": 2, "intermediate_size": 24},
    {"top_k": 2, "num_shared_experts": 1, "mix_shared": True},
]


def moe_config(moe: dict[str, Any], **options: Any) -> ModelConfig:
    return tiny_config(**{"num_experts": 5, "moe": moe, **options})


def layer_of(config: ModelConfig) -> MoE:
    layer = random_model(config).layers[0].feed_forward
    assert isinstance(layer, MoE)
    if layer.router.bias is not None:
        layer.router.bias.normal_(0, 1, generator=torch.Generator().manual_seed(3))
    return layer


def gated(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    return w2 @ (F.silu(w13[0] @ x) * (w13[1] @ x))


def by_hand(layer: MoE, x: Tensor, kept: Tensor | None = None) -> Tensor:
    """Token by token, expert by expert. `kept` bool [tokens, experts]."""
    moe, outputs = layer.router.config, []
    for i, token in enumerate(x):
        logits = layer.router.weight @ token
        scores = logits.softmax(-1) if moe.score == "softmax" else logits.sigmoid()
        ranking = scores if layer.router.bias is None else scores + layer.router.bias
        chosen = [e for e in ranking.topk(moe.top_k).indices.tolist() if kept is None or kept[i, e]]
        total = sum(scores[e] for e in chosen) if moe.normalises else 1.0
        routed = sum(
            (scores[e] / total * gated(token, layer.experts.w13[e], layer.experts.w2[e]) for e in chosen),
            start=torch.zeros_like(token),
        )
        if layer.shared is not None:
            shared = gated(token, layer.shared.w13.weight, layer.shared.w2.weight)
            if layer.mix is None:
                routed = routed + shared
            else:
                shares = (layer.mix.weight @ token + layer.mix.bias).softmax(-1)
                routed = shares[0] * routed + shares[1] * shared
        outputs.append(routed)
    return torch.stack(outputs)


@pytest.mark.parametrize("moe", SWITCHES, ids=str)
def test_layer_equals_sums_per_token(moe: dict[str, Any]) -> None:
    """Output and every gradient."""
    layer = layer_of(moe_config(moe)).double()
    x = torch.randn(13, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    weight = torch.randn(13, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    output, expected = layer(x), by_hand(layer, x)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    inputs = [x, *layer.parameters()]
    found, wanted = (torch.autograd.grad((y * weight).sum(), inputs, retain_graph=True) for y in (output, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_bias_changes_the_choice_and_not_the_weights() -> None:
    layer = layer_of(moe_config({"top_k": 2, "bias_rate": 0.1}))
    assert layer.router.bias is not None
    layer.router.bias.copy_(torch.tensor([9.0, 9, 0, 0, 0]))
    x = torch.randn(7, 32)
    routes, _ = layer.router(x, RowPart())
    assert set(routes.experts.flatten().tolist()) == {0, 1}
    scores = (x @ layer.router.weight.T).softmax(-1).gather(1, routes.experts)
    torch.testing.assert_close(routes.weights, scores / scores.sum(-1, keepdim=True))


# -- capacity ---------------------------------------------------------------------------------------------------------


def expected_kept(layer: MoE, x: Tensor, capacity: int) -> Tensor:
    """Each expert keeps its `capacity` best scores among the tokens that chose it."""
    scores = (x @ layer.router.weight.T).softmax(-1)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(
        1, scores.topk(layer.router.config.top_k).indices, True
    )
    kept = torch.zeros_like(chosen)
    for expert in range(scores.shape[1]):
        claims = scores[:, expert].masked_fill(~chosen[:, expert], -1)
        best = claims.topk(min(capacity, len(x))).indices
        kept[best, expert] = claims[best] >= 0
    return kept


@pytest.mark.parametrize(("factor", "smallest"), [(0.5, 1), (1.0, 1), (0.5, 6)])
@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_keep_their_best_tokens(factor: float, smallest: int, top_k: int) -> None:
    layer = layer_of(moe_config({"top_k": top_k, "capacity_factor": factor, "min_capacity": smallest})).double()
    x = torch.randn(30, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    kept = expected_kept(layer, x.detach(), max(smallest, ceil(30 * top_k / 5 * factor)))
    assert 0 < kept.sum() < 30 * top_k
    output, expected = layer(x), by_hand(layer, x, kept)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    inputs = [x, *layer.parameters()]
    found, wanted = (torch.autograd.grad(y.square().sum(), inputs, retain_graph=True) for y in (output, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    layer.router.ledger.sums = None
    output.sum().backward()
    assert layer.router.ledger.sums is not None and layer.router.ledger.sums[-1] == 30 * top_k - kept.sum()
    layer.eval()
    torch.testing.assert_close(layer(x), by_hand(layer, x), rtol=1e-6, atol=1e-6)  # nothing is dropped


def test_of_tokens_that_are_alike_experts_keep_the_first() -> None:
    """Other layouts round otherwise, and must drop the same ones: here each scores a bit higher than those before."""
    layer = layer_of(moe_config({"top_k": 1, "capacity_factor": 0.5, "min_capacity": 1}))
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(1)) * (1 + 1e-6 * torch.arange(10.0)[:, None])
    routes, _ = layer.router(x, RowPart())
    assert routes.kept is not None and len(routes.experts.unique()) == 1
    assert routes.kept.flatten().tolist() == [True] + [False] * 9


# -- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["all", "first"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_losses_and_their_gradients(score: str, over: str) -> None:
    """By their definitions; they reach the router's weight and the tokens, each row with its weight in the step."""
    layer = layer_of(moe_config({"top_k": 2, "score": score, "balance_over": over})).double()
    x = torch.randn(11, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    logits = x @ layer.router.weight.T
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    chosen = scores.topk(2).indices[:, : 1 if over == "first" else 2]
    fractions = torch.bincount(chosen.flatten(), minlength=5) / chosen.numel()
    balance = 5 * (fractions * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum()
    z = logits.logsumexp(-1).square().mean()
    inputs = [x, layer.router.weight]
    plain = torch.autograd.grad(layer(x).sum(), inputs)
    wanted = torch.autograd.grad(0.3 * balance + 0.2 * z, inputs)

    ledger = layer.router.ledger
    ledger.sums, ledger.loss_weights = None, (0.3, 0.2)
    found = torch.autograd.grad(layer(x).sum(), inputs)
    for with_losses, without, expected in zip(found, plain, wanted, strict=True):
        torch.testing.assert_close(with_losses - without, expected, rtol=1e-4, atol=1e-6)
    assert ledger.sums is not None
    load = torch.bincount(scores.topk(2).indices.flatten(), minlength=5)
    facts = torch.tensor([*load, balance.item(), z.item(), 0.0], dtype=torch.float64)
    torch.testing.assert_close(ledger.sums, facts, rtol=1e-6, atol=0)


def test_gshard_loss_of_the_reference() -> None:
    """top-1: experts * sum(mean gate * fraction); top-2: experts^2 * mean(mean gate * fraction of first choices)."""
    for top_k in (1, 2):
        layer = layer_of(moe_config({"top_k": top_k, "balance_over": "first"}))
        x = torch.randn(9, 32)
        layer(x).sum().backward()
        gates = (x @ layer.router.weight.T).softmax(-1)
        fraction = F.one_hot(gates.argmax(-1), 5).float().mean(0)
        expected = 5 * (gates.mean(0) * fraction).sum() if top_k == 1 else 25 * (gates.mean(0) * fraction).mean()
        assert layer.router.ledger.sums is not None
        torch.testing.assert_close(layer.router.ledger.sums[-3].float(), expected)


def test_nothing_is_noted_without_backward() -> None:
    model = random_model(moe_config({"top_k": 2}))
    with torch.no_grad():
        model(random_batch((9,)))
    model.loss(random_batch((9,)))
    assert all(layer.feed_forward.router.ledger.sums is None for layer in model.layers)


# -- the whole model --------------------------------------------------------------------------------------------------


def test_router_is_fp32_in_a_16_bit_model() -> None:
    model = Transformer(moe_config({"top_k": 2}, dtype="torch.bfloat16"))
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters() if name.startswith("layers.0.feed")}
    assert kinds.pop("layers.0.feed_forward.router.weight") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}
    plain = Transformer(moe_config({"top_k": 2, "router_fp32": False}, dtype="torch.bfloat16"))
    assert plain.layers[0].feed_forward.router.weight.dtype == torch.bfloat16


def test_cached_decoding_equals_the_whole_row() -> None:
    model = random_model(moe_config({"top_k": 2, "num_shared_experts": 1, "capacity_factor": 1.0})).eval()
    batch = random_batch((12,))
    cache = KVCache(model.config, 1, 12, "cpu", torch.float32)
    parts = [model.decode(part[None], cache)[0] for part in batch.tokens.split((7, 1, 1, 3))]
    torch.testing.assert_close(torch.stack(parts), model(batch)[[6, 7, 8, 11]], rtol=1e-5, atol=1e-5)
