"""From logits to the next token. Pure functions over fp32 logits [batch, vocab]."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from internlm.utils.errors import UserError

_COLDEST = 1e-5  # below this temperature the likeliest is taken: fp32 logits divided by less would overflow
_PENALTIES = (0.01, 100.0)  # beyond these, fp32 logits would overflow


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The default is greedy: the most likely one.

    Applied in this order: repetition penalty, temperature, top_k, top_p (that of transformers).
    """

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # candidates kept; 0: all
    top_p: float = 1.0  # the likeliest candidates that together reach this probability are kept
    repetition_penalty: float = 1.0  # > 1: tokens of the prompt and the output so far become less likely

    def __post_init__(self) -> None:
        penalty, (low, high) = self.repetition_penalty, _PENALTIES
        problems = {
            f"temperature={self.temperature} must be 0 or a positive number": not 0 <= self.temperature < math.inf,
            f"top_k={self.top_k} must not be negative": self.top_k < 0,
            f"top_p={self.top_p} must be above 0 and at most 1": not 0 < self.top_p <= 1,
            f"repetition_penalty={penalty} must be from {low} to {high}": not low <= penalty <= high,
        }
        found = [text for text, is_wrong in problems.items() if is_wrong]
        if found:
            raise UserError("sampling: " + "; ".join(found))

    def choose(self, logits: Tensor, seen: Tensor, generator: torch.Generator) -> Tensor:
        """logits [batch, vocab], seen bool [batch, vocab] -> int64 [batch]."""
        logits = penalise_repetition(logits.float(), seen, self.repetition_penalty)
        if self.temperature < _COLDEST:
            return logits.argmax(dim=-1)
        logits = keep_top_p(keep_top_k(logits / self.temperature, self.top_k), self.top_p)
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Scores of seen tokens divided by `penalty` if positive, multiplied if negative (Keskar et al., CTRL, 2019)."""
    if penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """All but the k largest logits of a row become -inf; candidates equal to the k-th stay. k = 0: all stay."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    smallest = logits.topk(k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """A candidate stays while those ahead of it hold less than `p` of the probability; the likeliest always stays."""
    if p == 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    ahead = probabilities.cumsum(dim=-1) - probabilities
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, ahead >= p)
    return logits.masked_fill(dropped, -torch.inf)
