"""Logits processing equal to transformers' processors; draws follow the probabilities."""

import math

import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from internlm.apis.sampling import Sampling, keep_top_k, keep_top_p, penalise_repetition
from internlm.utils.errors import UserError


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(5, 101, generator=torch.Generator().manual_seed(3)) * 3


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_repetition_penalty(logits: torch.Tensor, penalty: float) -> None:
    tokens = torch.randint(101, (5, 30), generator=torch.Generator().manual_seed(4))
    seen = torch.zeros(5, 101, dtype=torch.bool).scatter(1, tokens, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(tokens, logits.clone())
    torch.testing.assert_close(penalise_repetition(logits, seen, penalty), expected)


@pytest.mark.parametrize("k", [1, 7, 100, 101, 500])
def test_top_k(logits: torch.Tensor, k: int) -> None:
    assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(k)(torch.empty(0), logits.clone()))
    assert torch.equal(keep_top_k(logits, 0), logits)


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.8, 0.95, 1.0])
def test_top_p(logits: torch.Tensor, p: float) -> None:
    kept = keep_top_p(logits, p)
    if p < 1:
        assert torch.equal(kept, TopPLogitsWarper(p)(torch.empty(0), logits.clone()))
    assert kept.isfinite().any(dim=1).all()


def test_draws_follow_the_probabilities_after_all_processors() -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(5)) * 2
    seen = torch.zeros(1, 12, dtype=torch.bool)
    seen[0, :4] = True
    tokens = torch.arange(4)[None]
    expected = logits.clone()
    for processor in (
        RepetitionPenaltyLogitsProcessor(1.2),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(8),
        TopPLogitsWarper(0.9),
    ):
        expected = processor(tokens, expected)
    draws = 20000
    sampling = Sampling(temperature=0.7, top_k=8, top_p=0.9, repetition_penalty=1.2)
    generator = torch.Generator().manual_seed(6)
    chosen = sampling.choose(logits.expand(draws, -1), seen.expand(draws, -1), generator)
    frequency = torch.bincount(chosen, minlength=12) / draws
    probability = expected.softmax(-1)[0]
    assert (frequency[probability == 0] == 0).all()
    assert (frequency - probability).abs().max() < 4 * 0.5 / draws**0.5  # four standard deviations


def test_greedy_takes_the_likeliest(logits: torch.Tensor) -> None:
    seen = torch.zeros(5, 101, dtype=torch.bool)
    assert torch.equal(Sampling().choose(logits, seen, torch.Generator()), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-320, 1e-40, 1e-6, 1e-5])
def test_the_coldest_sampling_is_greedy(logits: torch.Tensor, temperature: float) -> None:
    seen = torch.ones(5, 101, dtype=torch.bool)
    for penalty in (0.01, 100.0):
        cold = Sampling(temperature, repetition_penalty=penalty)
        greedy = Sampling(repetition_penalty=penalty).choose(logits, seen, torch.Generator())
        assert torch.equal(cold.choose(logits, seen, torch.Generator()), greedy)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": value} for value in (-1.0, math.nan, math.inf)),
        *({"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_p": math.nan}),
        *({"repetition_penalty": value} for value in (0.0, 1e-40, 1e40, math.nan)),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)
